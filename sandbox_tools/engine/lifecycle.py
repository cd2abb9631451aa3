"""One sandbox's transitions between running, paused and gone, each safe against a crash at any point.

Every transition writes the sandbox's record before it lets go of the state it leaves, so that whoever comes after a
crash finds the old state whole or the new one. The caller holds the sandbox's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.guest_calls import initialise, reboot
from sandbox_tools.engine.images import snapshots
from sandbox_tools.engine.images.history import History
from sandbox_tools.engine.images.saved import Origin
from sandbox_tools.engine.images.writing import WantedError
from sandbox_tools.engine.records import RECORD, new_id
from sandbox_tools.engine.runs import Runs, disk_errors, remove
from sandbox_tools.errors import EngineError

log = logging.getLogger(__name__)

# Seconds that a call's answer may take to be on its way.
_ANSWERED = 0.05


class Lifecycle(Runs):
    """The transitions, over one state directory.

    Args:
        history: Keeps pauses where that was asked for.
        runs: What `Runs` takes.
    """

    def __init__(self, *runs: Any, history: History, **more: Any) -> None:
        super().__init__(*runs, **more)
        self.history = history
        self._behind: set[asyncio.Task[None]] = set()

    async def create(self, entry: Entry, origin: Origin, env: Mapping[str, str] | None) -> None:
        """Bring a new sandbox up, where it is not up already; where that fails nothing is left of it.

        Args:
            env: Environment variables of the whole sandbox. None: those of the origin.
        """
        record = entry.record
        try:
            tunnel = entry.tunnel or await self.start_run(entry, origin.image)
            let_out = self._bounds.lets_out(record)
            await initialise(tunnel, sandbox_id=record.id, token=record.token, env=env, let_out=let_out)
            if not origin.memory:
                await reboot(tunnel, sandbox_id=record.id, token=record.token)
            await self.save(entry)
        except BaseException:
            await self.end(entry, "it could not be started")
            raise

        self.runs(entry)

    async def resume(self, entry: Entry, lifetime: timedelta, *, memory: bool, changes: Mapping[str, Any]) -> None:
        """Bring a paused sandbox back; where that fails it stays paused, its snapshot untouched.

        Args:
            lifetime: How long it will run.
            memory: Whether its memory and processes come back too; without, as after a reboot.
            changes: Of the record, from then on.
        """
        paused = entry.record
        snapshot = self._snapshot(entry)
        entry.phase = "resuming"
        try:
            now = self._now()
            entry.record = paused.resumed(now, now + lifetime).model_copy(update=dict(changes))
            tunnel = await self.start_run(entry, snapshot)
            if paused.pause_memory and not memory:
                await reboot(tunnel, sandbox_id=paused.id, token=paused.token)
            with disk_errors("snapshot", entry):
                await self.history.announce(paused, snapshot)
            # Until this is written the snapshot is the truth; from then on the live container is.
            await self.save(entry)
        except BaseException:
            await self.end_run(entry, "it could not be resumed")
            entry.record = paused
            # The failed write may have reached the disk all the same.
            with contextlib.suppress(EngineError):
                await self.save(entry)
            entry.phase = "paused"
            raise

        self.runs(entry)
        if not await self.history.keep(paused, snapshot):
            # A gigabyte takes a while, which nobody has to wait for.
            self._do_behind(remove(snapshot))

    async def pause(self, entry: Entry, *, memory: bool, for_good: bool = False) -> None:
        """Memory, processes and files on disk, RAM free; or none of it where somebody wants it back before that.

        Args:
            memory: Without, its processes are ended first, so that files are all there is to be resumed.
            for_good: Whoever wants it has to wait.

        Raises:
            EngineError: It could not be written. The sandbox goes on running, unless its phase says that it is gone.
        """
        running = entry.record
        # A name of its own each time: what a pause that was given up leaves is removed behind it.
        final = self.snapshots / running.id / new_id()
        wanted = entry.wanted if memory and not for_good else asyncio.Event()
        entry.phase = "pausing" if memory else "shutting down"
        self.let_go(entry, "the sandbox is being paused")
        try:
            if not memory:
                await self._reboot(entry)
            container, stands = self.container(entry), entry.record.frozen
            # Nothing runs on until its turn has come, nor between the image and the end of the container.
            if not stands and self._writing.busy:
                await self.runtime.freeze(container)
                stands = True
            manifest = await self._writing.write(container, final, wanted=wanted, running=not stands)
            changes = {"snapshot": final.name, "snapshot_bytes": manifest.size, "pause_memory": memory}
            entry.record = entry.record.turned(now := self._now(), state="paused", end_at=now, **changes)
            # Until this is written the live container is the truth; from then on the snapshot is.
            await self.save(entry)
        except WantedError:
            if not await self._go_on(entry, final):
                msg = f"Sandbox {running.id} ended while it was being paused."
                raise EngineError(msg, op="pause", sandbox_id=running.id) from None
            return
        except (OSError, EngineError) as error:
            entry.record = running
            outcome = "goes on running" if await self._go_on(entry, final) else "is lost"
            msg = f"Sandbox {running.id} could not be paused and {outcome}: {error}"
            raise EngineError(msg, op="pause", sandbox_id=running.id) from error

        entry.phase = "paused"
        # To take a gigabyte of memory down takes 0.1 s; whoever resumes it meanwhile gets another container.
        self._do_behind(self.end_container(self.container(entry)))

    async def write_image(self, entry: Entry, final: Path, description: str | None = None) -> snapshots.Manifest:
        """An image of a running sandbox, which stands still meanwhile and not longer, unless it is frozen.

        Args:
            final: Where the image will be.
            description: Kept with the image, as `snapshots.DESCRIPTION`. None: there is none.

        Raises:
            EngineError: It could not be written; there is nothing at `final`.
        """
        try:
            with disk_errors("snapshot", entry):
                return await self._writing.write(
                    self.container(entry),
                    final,
                    wanted=asyncio.Event(),
                    running=not entry.record.frozen,
                    description=description,
                )
        finally:
            try:
                await (self.runtime.freeze if entry.record.frozen else self.runtime.thaw)(self.container(entry))
            except EngineError:
                # Adopting thaws. Where that fails as well it is without a tunnel, and whoever connects tries again.
                await self.adopt(entry)

    async def end(self, entry: Entry, reason: str) -> None:
        """End the sandbox, running or paused, and remove all of it."""
        entry.phase = "gone"
        # The record goes first: what a crash leaves of the rest, the next engine sweeps.
        (self.directory(entry) / RECORD).unlink(missing_ok=True)
        await self.end_run(entry, reason)
        await remove(self.directory(entry))
        await remove(self.snapshots / entry.record.id)
        await self.history.forget(entry.record.id)

    async def drop_run(self, entry: Entry) -> None:
        """Make sure that nothing of a paused sandbox's last run is alive."""
        await self.end_run(entry, "the sandbox is paused")

    async def aclose(self) -> None:
        """Wait for what goes on behind answered calls."""
        await asyncio.gather(*self._behind, return_exceptions=True)
        await self._writing.aclose()
        await self.runtime.aclose()

    def _snapshot(self, entry: Entry) -> Path:
        return self.snapshots / entry.record.id / str(entry.record.snapshot)

    def _do_behind(self, work: Coroutine[None, None, None]) -> None:
        """Have it done; nobody waits but `aclose`."""
        task = asyncio.create_task(_once_answered(work))
        self._behind.add(task)
        task.add_done_callback(self._done_behind)

    def _done_behind(self, task: asyncio.Task[None]) -> None:
        self._behind.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("What is done behind answered calls failed: %s", error)

    async def _go_on(self, entry: Entry, snapshot: Path) -> bool:
        """Let a sandbox that could not be paused run on; whether it still can."""
        if not await self.adopt(entry):
            await self.end(entry, "it ended while it was being paused")
            return False

        # The failed pause may have got as far as the record, which then needs its snapshot until it is put right.
        with contextlib.suppress(EngineError):
            await self.save(entry)
            await remove(snapshot)
        return True


async def _once_answered(work: Coroutine[None, None, None]) -> None:
    # On two cores it would hold the answer up by 10 ms.
    await asyncio.sleep(_ANSWERED)
    await work
