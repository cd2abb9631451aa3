"""How much all snapshots together may take of the disk, and what goes first when that is not enough."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.saved import Saved
from sandbox_tools.errors import EngineError


class Quota:
    """The bound on one engine's snapshots.

    Kept pauses go first, the oldest before the others: nobody needs them to have a sandbox back. What somebody does
    need stays, and the new image is refused.

    Args:
        paused: The sandboxes that sleep.
        most: Bytes. None: what the disk has.
    """

    def __init__(self, paused: Callable[[], Iterable[Entry]], saved: Saved, *, most: int | None) -> None:
        self._paused = paused
        self._saved = saved
        self.most = most
        self._promised = 0

    @property
    def used(self) -> int:
        """Bytes that are taken, or promised to what is being written."""
        paused = sum(entry.record.snapshot_bytes for entry in self._paused())
        return paused + sum(each.size for each in self._saved.all()) + self._promised

    @asynccontextmanager
    async def room(self, need: int) -> AsyncIterator[None]:
        """Room for an image of so many bytes at most, while it is written.

        Raises:
            EngineError: There is none.
        """
        while self.most is not None and self.used + need > self.most:
            kept = [each for each in self._saved.all() if each.kept]
            if not kept:
                msg = (
                    f"The image may need {need >> 20} MB, and snapshots have {self.used >> 20} of the "
                    f"{self.most >> 20} MB that they may have. Kill paused sandboxes, or delete snapshots."
                )
                raise EngineError(msg)
            await self._saved.remove(kept[-1].reference)
        self._promised += need
        try:
            yield
        finally:
            self._promised -= need
