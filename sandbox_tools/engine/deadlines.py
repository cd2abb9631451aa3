"""When sandboxes reach their timeouts, and what is done then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime

from sandbox_tools.engine.entry import Entry

# Looked at once a minute at least: the loop's clock stands still while the machine is suspended.
_LOOK = 60.0  # seconds


class Deadlines:
    """Calls for each running sandbox that has reached its end.

    Args:
        running: The sandboxes to watch.
        now: The wall clock.
        on_end: Told of a sandbox that has reached its end; it must move the end, or the sandbox out of `running`,
            before it returns.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[Entry]],
        *,
        now: Callable[[], datetime],
        on_end: Callable[[Entry], None],
    ) -> None:
        self._running = running
        self._now = now
        self._on_end = on_end
        self._changed = asyncio.Event()
        self._clock: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._clock = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Watch no more."""
        if self._clock is not None:
            self._clock.cancel()

    def changed(self) -> None:
        """Told when a sandbox begins to run or its end moves."""
        self._changed.set()

    async def _watch(self) -> None:
        while True:
            self._changed.clear()
            now = self._now()
            for entry in [entry for entry in self._running() if entry.record.end_at <= now]:
                self._on_end(entry)
            nearest = min((entry.record.end_at for entry in self._running()), default=None)
            wait = None if nearest is None else min(_LOOK, (nearest - now).total_seconds())
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue
