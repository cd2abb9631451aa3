"""Wakes when a sandbox is due for a decision, and beats while anything is in use; one task for all sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sandbox_tools.errors import SandboxError
from sandbox_tools.session.clock import Clock

log = logging.getLogger("sandbox_tools.session")

BEAT = 15.0
"""Seconds between two renewals; four may fail before a use expires."""

RETRY = 30.0
"""Seconds until a pause that failed is tried again."""


class Sweeper:
    """Holds the times at which sandboxes are due.

    Args:
        settle: Decides on one sandbox; returns when to ask again, in seconds since the epoch, or None.
        beat: Renews what this registry holds.
        spawn: Runs a coroutine as a task that outlives the sweeper's own cancellation.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        settle: Callable[[str], Awaitable[float | None]],
        beat: Callable[[], Awaitable[None]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._clock = clock
        self._settle = settle
        self._beat = beat
        self._spawn = spawn
        self._due: dict[str, float] = {}
        self._woken = asyncio.Event()
        self._next_beat = clock.time() + BEAT

    def schedule(self, handle: str, when: float) -> None:
        """Decide on that sandbox at `when`, in seconds since the epoch; replaces an earlier time."""
        self._due[handle] = when
        self._woken.set()

    async def settle(self, handle: str) -> None:
        """Decide on that sandbox now. A failure is logged and tried again, because nobody waits for its outcome."""
        self._due.pop(handle, None)
        try:
            again = await self._settle(handle)
        except Exception as error:
            unexpected = not isinstance(error, SandboxError)
            log.warning("could not pause %s, trying again in %g s: %s", handle, RETRY, error, exc_info=unexpected)
            again = self._clock.time() + RETRY
        if again is not None:
            self.schedule(handle, again)

    async def sweep(self) -> None:
        """Do all that is due, and return when it is done."""
        await asyncio.gather(*self._due_now())

    async def run(self) -> None:
        """Do all that is due whenever it is, until cancelled."""
        while True:
            self._woken.clear()
            for work in self._due_now():
                # Not awaited: a pause may take longer than a beat.
                self._spawn(work)
            await self._clock.wait(self._woken, min([self._next_beat, *self._due.values()]))

    def _due_now(self) -> list[Coroutine[Any, Any, None]]:
        now = self._clock.time()
        due = [handle for handle, when in self._due.items() if when <= now]
        for handle in due:
            del self._due[handle]
        work: list[Coroutine[Any, Any, None]] = [self.settle(handle) for handle in due]
        if now >= self._next_beat:
            self._next_beat = now + BEAT
            work.append(self._beat_quietly())
        return work

    async def _beat_quietly(self) -> None:
        try:
            await self._beat()
        except Exception:
            log.exception("could not renew the leases")
