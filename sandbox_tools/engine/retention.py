"""How long a paused sandbox is kept, counted from its pause, and who ends it then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime, timedelta

from sandbox_tools.engine.entry import Entry

log = logging.getLogger(__name__)

DEFAULT_DAYS = 30.0

_LOOK = 3600.0  # seconds; whoever asks for a sandbox whose time is over finds it gone before the next look


class Retention:
    """Ends what has slept for longer than it is kept.

    Args:
        paused: The sandboxes that sleep.
        days: How long each is kept. 0: until it is killed.
        now: The wall clock.
        on_over: Told of one whose time is over.
    """

    def __init__(
        self,
        paused: Callable[[], Iterable[Entry]],
        *,
        days: float,
        now: Callable[[], datetime],
        on_over: Callable[[Entry], Awaitable[None]],
    ) -> None:
        self._paused = paused
        self.days = days
        self._now = now
        self._on_over = on_over
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, now and once an hour."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    def ends_at(self, entry: Entry) -> datetime | None:
        """When a paused sandbox's time is over. None: it is not paused, or kept for ever."""
        if entry.phase != "paused" or not self.days:
            return None
        return entry.record.end_at + timedelta(days=self.days)

    def over(self, entry: Entry) -> bool:
        """Whether it is."""
        end = self.ends_at(entry)
        return end is not None and end <= self._now()

    async def look(self) -> None:
        """End what is over now."""
        for entry in [entry for entry in self._paused() if self.over(entry)]:
            try:
                await self._on_over(entry)
            except Exception:
                log.exception("Sandbox %s could not be ended, which is tried again", entry.record.id)

    async def _watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_LOOK)
