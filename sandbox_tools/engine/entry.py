"""A sandbox in the engine's memory: its record, and what is alive of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from sandbox_tools.engine.listing import micros
from sandbox_tools.engine.records import Record
from sandbox_tools.engine.tunnel import Tunnel

Phase = Literal["running", "pausing", "shutting down", "paused", "resuming", "gone"]
"""`shutting down` is the way to a pause that keeps files only. What is frozen is `running`, and its record says so."""


class Entry:
    """One of them."""

    def __init__(self, record: Record, phase: Phase) -> None:
        self.record = record
        self.phase: Phase = phase
        # One transition at a time; whoever waited looks at the phase again.
        self.lock = asyncio.Lock()
        # None whenever traffic must not reach the sandbox.
        self.tunnel: Tunnel | None = None
        # Set while somebody waits to have it running.
        self.wanted = asyncio.Event()
        self._wanting = 0
        self._row: tuple[Record, tuple[str, tuple[int, ...], Entry]] | None = None
        self.watch: asyncio.Task[None] | None = None

    @property
    def row(self) -> tuple[str, tuple[int, ...], Entry]:
        """It as a `listing.Row`; kept, as there may be thousands for a page of a hundred."""
        record = self.record
        if self._row is None or self._row[0] is not record:
            starts = (record.started_at, *record.earlier_starts)
            self._row = record, (record.id, tuple(micros(start) for start in starts), self)
        return self._row[1]

    @property
    def awake(self) -> bool:
        """Whether traffic can reach it as it is."""
        return self.phase == "running" and not self.record.frozen and self.tunnel is not None and self.tunnel.attached

    @asynccontextmanager
    async def claimed(self, *, wanted: bool = True) -> AsyncIterator[None]:
        """Its lock, for who wants it to run, or to be gone: a pause that is under way, or has its turn first, is given
        up, as it would only be undone.

        Args:
            wanted: Without, it is waited for.
        """
        self._wanting += wanted
        if wanted:
            self.wanted.set()
        try:
            await self.lock.acquire()
        finally:
            self._wanting -= wanted
            if not self._wanting:
                self.wanted.clear()
        try:
            yield
        finally:
            self.lock.release()
