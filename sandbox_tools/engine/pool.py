"""Sandboxes that nobody has asked for yet: restored and frozen, so that the next create is a thaw."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

from sandbox_tools.engine.bodies import NewSandbox
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.guest_calls import warm
from sandbox_tools.engine.images.saved import Origin
from sandbox_tools.engine.records import Record, new_record
from sandbox_tools.engine.runs import Runs, remove
from sandbox_tools.errors import EngineError
from sandbox_tools.models import DEFAULT_TIMEOUT

log = logging.getLogger(__name__)

DEFAULT_SIZE = 1

# Seconds for which nobody has created anything before one is made ready: that takes a core for a moment, which is the
# new sandbox's first.
_CALM = 1.0

# After one could not be made ready.
_RETRY = 60.0


class Pool:
    """What is ready, made of one origin.

    They have no record on the disk: what a crash leaves of them the next engine ends as something that nobody knows.
    They hold memory like any frozen sandbox, and don't count among those that may run.

    Args:
        size: How many are kept ready. 0: none.
        now: The wall clock.
    """

    def __init__(self, runs: Runs, origin: Origin, *, size: int, now: Callable[[], datetime]) -> None:
        self.origin = origin
        self._runs = runs
        self._size = size
        self._now = now
        self._ready: list[Entry] = []
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._making: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fill it."""
        if self._size:
            self._task = asyncio.create_task(self._fill())

    async def stop(self) -> None:
        """End what is ready."""
        if self._task is not None:
            self._task.cancel()
        if self._making is not None:
            # A verb that is left alone would bring one up that nobody ends.
            await asyncio.wait({self._making})
        await asyncio.gather(*(self._end(entry) for entry in self._ready))
        self._ready.clear()

    async def take(self, origin: Origin, record: Record) -> Entry | None:
        """One that runs and has nobody's name yet, as that record's, whose id becomes the one that it was made with.

        None: there is none, or none of that origin.
        """
        self._asked.set()
        while self._ready and origin.image == self.origin.image:
            spare = self._ready.pop()
            ours = {"id": spare.record.id, "run": spare.record.run}
            spare.record = record.model_copy(update=ours)
            try:
                await self._runs.runtime.thaw(self._runs.container(spare))
                return spare
            except EngineError as error:
                log.warning("A sandbox that was kept ready is no more: %s", error)
                await self._end(spare)
        return None

    async def _fill(self) -> None:
        while True:
            await self._calm()
            while len(self._ready) < self._size:
                self._making = asyncio.create_task(self._make())
                try:
                    await asyncio.shield(self._making)
                except EngineError as error:
                    log.warning("No sandbox could be made ready, which is tried again: %s", error)
                    await asyncio.sleep(_RETRY)
            await self._asked.wait()

    async def _calm(self) -> None:
        """Until nobody has asked for one for a while."""
        while True:
            self._asked.clear()
            try:
                async with asyncio.timeout(_CALM):
                    await self._asked.wait()
            except TimeoutError:
                return

    async def _make(self) -> None:
        request = NewSandbox.model_validate({"templateID": self.origin.name})
        spare = Entry(new_record(self.origin, now=self._now(), timeout=DEFAULT_TIMEOUT, request=request), "resuming")
        try:
            tunnel = await self._runs.start_run(spare, self.origin.image)
            await warm(tunnel, sandbox_id=spare.record.id)
            await self._runs.runtime.freeze(self._runs.container(spare))
        except EngineError:
            await self._end(spare)
            raise
        self._ready.append(spare)

    async def _end(self, spare: Entry) -> None:
        await self._runs.end_run(spare, "nobody asked for it")
        await remove(self._runs.directory(spare))
