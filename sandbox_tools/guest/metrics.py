"""envd's `GET /metrics`: how much of the machine that the sandbox is shown it uses."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request


def routes() -> list[Route]:
    """The one route; it remembers when it was last asked."""
    meter = Meter()

    async def metrics(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(meter.read))

    return [Route("/metrics", metrics)]


class Meter:
    """Reads what there is; the share of the processors is that since the last reading, 0 at the first."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None

    def read(self) -> dict[str, Any]:
        """Sizes in bytes and, where it says so, MiB; `ts` in seconds since 1970; 100 % are all processors."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage("/")
        return {
            "ts": int(time.time()),
            "cpu_count": os.cpu_count() or 1,
            "cpu_used_pct": self._processors(),
            "mem_total": memory.total,
            "mem_used": memory.used,
            "mem_cache": memory.cached,
            "mem_total_mib": memory.total >> 20,
            "mem_used_mib": memory.used >> 20,
            "disk_used": disk.used,
            "disk_total": disk.total,
        }

    def _processors(self) -> float:
        # gVisor's /proc/stat is all zeros, but it knows the times of each process.
        used = 0.0
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system

        now = time.monotonic()
        (then, used_then), self._before = self._before or (now, used), (now, used)
        if now <= then:
            return 0.0
        # Processes that have ended take their times with them.
        share = max(used - used_then, 0.0) / (now - then) / (os.cpu_count() or 1)
        return round(100 * min(share, 1.0), 2)
