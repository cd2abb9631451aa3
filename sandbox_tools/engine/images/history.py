"""The last pauses of a sandbox, kept as snapshots where that was asked for, so that one can go back to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path

from sandbox_tools.engine.images.saved import Saved, Snapshot
from sandbox_tools.engine.images.snapshots import DESCRIPTION, sync, write_durably
from sandbox_tools.engine.records import Record

log = logging.getLogger(__name__)


class History:
    """What was kept, among the snapshots of one engine.

    A pause that is to be kept says so of itself before its sandbox runs on, and is moved afterwards: whatever happens
    in between, the next engine finds it and knows what it is.
    """

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    async def announce(self, paused: Record, image: Path) -> None:
        """Have the image of a pause say that it is to be kept.

        Raises:
            OSError: The disk is full or failing.
        """
        if paused.keep_history:
            kept = Snapshot(
                id=image.name,
                sandbox_id=paused.id,
                template=paused.template,
                runsc=paused.runsc,
                memory_mb=paused.memory_mb,
                cpu=paused.cpu,
                disk_mb=paused.disk_mb,
                memory=paused.pause_memory,
                created_at=paused.end_at,
                size=paused.snapshot_bytes,
                kept=True,
            )
            await asyncio.to_thread(write_durably, image / DESCRIPTION, kept.model_dump_json())

    async def keep(self, paused: Record, image: Path) -> bool:
        """Keep the image of a pause that its sandbox does not need any more. False: it is not to be kept."""
        if not paused.keep_history:
            return False

        try:
            await asyncio.to_thread(self.move, image)
            self._saved.add(await asyncio.to_thread(self._saved.read, image.name))
        except (OSError, ValueError) as error:
            log.error("The pause %s of sandbox %s could not be kept: %s", image.name, paused.id, error)
            return False
        for old in self.of(paused.id)[paused.keep_history :]:
            await self._saved.remove(old.reference)
        return True

    def of(self, sandbox_id: str) -> list[Snapshot]:
        """The pauses of a sandbox that are kept, newest first."""
        return [each for each in self._saved.all() if each.kept and each.sandbox_id == sandbox_id]

    async def forget(self, sandbox_id: str) -> None:
        """Delete what is kept of a sandbox."""
        for each in self.of(sandbox_id):
            await self._saved.remove(each.reference)

    async def start(self, sandbox_ids: Collection[str]) -> None:
        """Delete what is kept of sandboxes that are no more."""
        for each in self._saved.all():
            if each.kept and each.sandbox_id not in sandbox_ids:
                await self._saved.remove(each.reference)

    def move(self, image: Path) -> None:
        """Put an image that says that it is to be kept where such images are."""
        self._saved.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        image.rename(self._saved.path(image.name))
        sync(self._saved.directory)
