"""What each running sandbox takes of the host, sampled on the host: the guest is never asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.runtime import Container, Runtime, Usage

INTERVAL = 5.0
"""Seconds between two samples."""

KEPT = 720
"""Samples of a sandbox that are kept: an hour of running."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One moment of one sandbox; bytes, and CPU in percent of one core times the number of cores."""

    at: datetime
    cpu_count: int
    cpu_used_pct: float
    memory_used: int
    memory_total: int
    cache: int
    disk_used: int
    disk_total: int


class Metering:
    """The samples of all sandboxes, in memory: over a pause they are kept, over the engine's end they are not.

    Args:
        running: The sandboxes to sample.
        container: The container of a sandbox's current run.
        now: The wall clock.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[Entry]],
        container: Callable[[Entry], Container],
        runtime: Runtime,
        *,
        now: Callable[[], datetime],
    ) -> None:
        self._running = running
        self._container = container
        self._runtime = runtime
        self._now = now
        self._samples: dict[str, deque[Sample]] = {}
        self._last: dict[str, tuple[datetime, Usage]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sample."""
        self._task = asyncio.create_task(self._sample_all())

    def stop(self) -> None:
        """Sample no more."""
        if self._task is not None:
            self._task.cancel()

    def forget(self, sandbox_id: str) -> None:
        """Drop the samples of a sandbox that is gone."""
        self._samples.pop(sandbox_id, None)
        for container_id in [each for each in self._last if each.startswith(f"{sandbox_id}-")]:
            del self._last[container_id]

    async def samples(self, entry: Entry) -> list[Sample]:
        """Oldest first; a sandbox that has only begun to run is sampled now."""
        if entry.phase == "running" and self._container(entry).id not in self._last:
            await self._sample(entry)
        return list(self._samples.get(entry.record.id, ()))

    async def _sample_all(self) -> None:
        while True:
            for entry in list(self._running()):
                await self._sample(entry)
            await asyncio.sleep(INTERVAL)

    async def _sample(self, entry: Entry) -> None:
        container, sandbox_id = self._container(entry), entry.record.id
        try:
            usage = await asyncio.to_thread(self._runtime.usage, container)
        except OSError:  # it is ending just now
            usage = None
        if usage is None or entry.phase != "running" or self._container(entry) != container:
            return

        now = self._now()
        before, used = self._last.get(container.id, (entry.record.started_at, None))
        seconds = (now - before).total_seconds()
        worked = usage.cpu_seconds - (used.cpu_seconds if used else 0.0)
        self._last = {each: value for each, value in self._last.items() if not each.startswith(f"{sandbox_id}-")}
        self._last[container.id] = (now, usage)
        self._samples.setdefault(sandbox_id, deque(maxlen=KEPT)).append(
            Sample(
                at=now,
                cpu_count=entry.record.cpu_count,
                cpu_used_pct=round(max(worked, 0.0) / seconds * 100, 2) if seconds > 0 else 0.0,
                memory_used=usage.memory,
                memory_total=entry.record.memory_mb << 20,
                cache=usage.cache,
                disk_used=usage.disk,
                disk_total=usage.disk + usage.disk_free,
            )
        )
