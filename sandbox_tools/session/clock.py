"""The time that sessions live by, so that tests can turn it by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Two implementations: `SystemClock`, and `sandbox_tools.testing.ManualClock`."""

    def time(self) -> float:
        """Seconds since the epoch: other processes read what we write with it."""
        ...

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Return when `event` is set or `until` is reached; returning early is allowed."""
        ...


class SystemClock:
    """The machine's wall clock."""

    def time(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Wait for the event, at most until then."""
        try:
            async with asyncio.timeout(max(0.0, until - time.time())):
                await event.wait()
        except TimeoutError:
            pass
