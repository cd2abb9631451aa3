"""One task and one heap for all sandboxes of a process: who is due when, and what is done round after round."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from sandbox_tools.session.clock import Clock

log = logging.getLogger("sandbox_tools.session")


@dataclass(slots=True)
class Round:
    """Something that is done every `every` seconds; a turn of it that lasts longer than that skips the next."""

    every: float
    work: Callable[[], Awaitable[None]]
    next: float = 0.0
    busy: bool = False


class Schedule:
    """Wakes at the next due time of any sandbox, or for the next round.

    Args:
        settle: What is done with a sandbox that is due.
        spawn: Runs a coroutine as a task that outlives the schedule's own cancellation.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        settle: Callable[[str], Coroutine[Any, Any, None]],
        rounds: list[Round],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._clock = clock
        self._settle = settle
        self._spawn = spawn
        self._rounds = rounds
        for each in rounds:
            each.next = clock.time() + each.every
        # The heap may hold times that have been replaced since; `_due` has the one that counts.
        self._heap: list[tuple[float, str]] = []
        self._due: dict[str, float] = {}
        self._woken = asyncio.Event()

    def add(self, handle: str, when: float) -> None:
        """That sandbox is due at `when`, in seconds since the epoch; replaces its earlier time."""
        self._due[handle] = when
        heapq.heappush(self._heap, (when, handle))
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(at, due) for due, at in self._due.items()]
            heapq.heapify(self._heap)
        if self._heap[0][0] >= when:
            self._woken.set()

    def discard(self, handle: str) -> None:
        """It is not due any more."""
        self._due.pop(handle, None)

    async def sweep(self) -> None:
        """Do all that is due, and return when it is done."""
        await asyncio.gather(*self._due_now())

    async def run(self) -> None:
        """Do all that is due whenever it is, until cancelled."""
        while True:
            self._woken.clear()
            for work in self._due_now():
                # Not awaited: a pause may take longer than a round.
                self._spawn(work)
            first = min(each.next for each in self._rounds)
            await self._clock.wait(self._woken, min(first, self._heap[0][0]) if self._heap else first)

    def _due_now(self) -> list[Coroutine[Any, Any, None]]:
        now = self._clock.time()
        work = []
        while self._heap and self._heap[0][0] <= now:
            when, handle = heapq.heappop(self._heap)
            if self._due.get(handle) == when:
                del self._due[handle]
                work.append(self._settle(handle))
        for each in self._rounds:
            if each.next <= now:
                each.next = now + each.every
                if not each.busy:
                    each.busy = True
                    work.append(self._do(each))
        return work

    async def _do(self, each: Round) -> None:
        try:
            await each.work()
        except Exception:
            log.exception("a round of the session's housekeeping failed")
        finally:
            each.busy = False
