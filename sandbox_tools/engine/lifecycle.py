"""One sandbox's transitions between running, paused and gone, each safe against a crash at any point.

Every transition writes the sandbox's record before it lets go of the state it leaves, so that whoever comes after a
crash finds the old state whole or the new one. The caller holds the sandbox's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sandbox_tools.engine import snapshots, templates
from sandbox_tools.engine.bounds import Bounds
from sandbox_tools.engine.bundle import write_bundle
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.guest_calls import check_health, initialise, reboot
from sandbox_tools.engine.records import RECORD, new_run
from sandbox_tools.engine.runtime import Container, Runtime
from sandbox_tools.engine.saved import Origin
from sandbox_tools.engine.store import Store
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.engine.writing import WantedError, Writing
from sandbox_tools.errors import EngineError, ServerError

log = logging.getLogger(__name__)


class Lifecycle:
    """The transitions, over one state directory.

    Args:
        state: The engine's state directory.
        template_directory: Where the templates are.
        store: Where images are written and read.
        bounds: What each sandbox may take at most.
        now: The wall clock.
        on_end: Told of a sandbox whose container ended by itself.
    """

    def __init__(
        self,
        state: Path,
        template_directory: Path,
        runtime: Runtime,
        store: Store,
        *,
        bounds: Bounds,
        now: Callable[[], datetime],
        on_end: Callable[[Entry, Container], None],
    ) -> None:
        self.sandboxes = state / "sandboxes"
        self.snapshots = state / "snapshots"
        self.runtime = runtime
        self._store = store
        self._writing = Writing(runtime, store)
        self._template_directory = template_directory
        self._bounds = bounds
        self._now = now
        self._on_end = on_end

    def container(self, entry: Entry) -> Container:
        """The container of the sandbox's current run; every resume makes a new one."""
        record = entry.record
        return Container(
            id=f"{record.id}-{record.run}",
            directory=self._directory(entry) / f"run-{record.run}",
            binary=self._template_directory / "runsc" / record.runsc,
        )

    def resident_bytes(self, entry: Entry) -> int:
        """RAM that the sandbox holds on the host now; 0 if it is gone."""
        return self.runtime.resident_bytes(self.container(entry))

    async def create(self, entry: Entry, origin: Origin, env: Mapping[str, str] | None) -> None:
        """Bring a new sandbox up; where that fails nothing is left of it.

        Args:
            env: Environment variables of the whole sandbox. None: those of the origin.
        """
        record = entry.record
        try:
            tunnel = await self._start_run(entry, origin.image)
            let_out = self._bounds.lets_out(record)
            await initialise(tunnel, sandbox_id=record.id, token=record.token, env=env, let_out=let_out)
            if not origin.memory:
                await reboot(tunnel, sandbox_id=record.id, token=record.token)
            await self.save(entry)
        except BaseException:
            await self.end(entry, "it could not be started")
            raise

        self._runs(entry)

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
            tunnel = await self._start_run(entry, snapshot)
            if paused.pause_memory and not memory:
                await reboot(tunnel, sandbox_id=paused.id, token=paused.token)
            # Until this is written the snapshot is the truth; from then on the live container is.
            await self.save(entry)
        except BaseException:
            await self._end_run(entry, "it could not be resumed")
            entry.record = paused
            # The failed write may have reached the disk all the same.
            with contextlib.suppress(EngineError):
                await self.save(entry)
            entry.phase = "paused"
            raise

        self._runs(entry)
        await _remove(snapshot)

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
        final = self.snapshots / running.id / new_run()
        wanted = entry.wanted if memory and not for_good else asyncio.Event()
        entry.phase = "pausing" if memory else "shutting down"
        self._let_go(entry, "the sandbox is being paused")
        try:
            if not memory:
                await self._reboot(entry)
            manifest = await self._write_snapshot(entry, final, wanted=wanted)
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
        await self._end_run(entry, "the sandbox is paused")

    async def write_image(self, entry: Entry, final: Path, description: str | None = None) -> snapshots.Manifest:
        """An image of a running sandbox, which stands still meanwhile and not longer, unless it is frozen.

        Args:
            final: Where the image will be.
            description: Kept with the image, as `snapshots.DESCRIPTION`. None: there is none.

        Raises:
            EngineError: It could not be written; there is nothing at `final`.
        """
        try:
            with _disk_errors("snapshot", entry):
                return await self._write_snapshot(entry, final, description, wanted=asyncio.Event())
        finally:
            try:
                await (self.runtime.freeze if entry.record.frozen else self.runtime.thaw)(self.container(entry))
            except EngineError:
                # Adopting thaws. Where that fails as well it is without a tunnel, and whoever connects tries again.
                await self.adopt(entry)

    async def freeze(self, entry: Entry) -> None:
        """Stop a running sandbox's tasks and keep its RAM; its tunnel stays as it is.

        Raises:
            EngineError: They may not all be stopped. It is to be thawed.
        """
        # First, as from here on traffic has to wait for the lock, and thaws.
        await self._mark(entry, frozen=True)
        await self.runtime.freeze(self.container(entry))

    async def thaw(self, entry: Entry) -> bool:
        """Let a frozen sandbox run on; adopts it where that fails or leads to no tunnel. False: it is gone."""
        with contextlib.suppress(EngineError):
            await self._thaw(entry)
            if entry.awake:
                return True
        return await self.adopt(entry)

    async def keep(self, entry: Entry) -> bool:
        """Leave what an earlier engine has frozen as it is, without a tunnel. False: it may not be frozen."""
        with contextlib.suppress(EngineError):
            if await self.runtime.state(self.container(entry)) == "frozen":
                self._runs(entry)
                return True
        return False

    async def check_health(self, entry: Entry) -> None:
        """Have a sign of life from the guest of a running sandbox.

        Raises:
            ServerError: 503, it gave none.
        """
        record = entry.record
        try:
            if entry.tunnel is None:
                msg = "it can't be reached"
                raise EngineError(msg)
            await check_health(entry.tunnel, sandbox_id=record.id, token=record.token)
        except EngineError as error:
            msg = f"The guest of sandbox {record.id} does not answer ({error}). It was not paused and goes on running."
            raise ServerError(msg, status_code=503, op="pause", sandbox_id=record.id) from error

    async def restart(self, entry: Entry) -> None:
        """Reboot a running sandbox.

        Raises:
            EngineError: The guest did not answer, or some of its processes could not be ended; the sandbox runs on.
        """
        self._let_go(entry, "the sandbox is being rebooted")
        try:
            await self._reboot(entry)
        finally:
            await self.adopt(entry)

    async def adopt(self, entry: Entry) -> bool:
        """Take over the container of a sandbox that runs. False: it is gone.

        One that lives and can't be reached now is kept, without a tunnel: it can still be paused and killed, and the
        next connect tries again.
        """
        container = self.container(entry)
        self._let_go(entry, "the engine attaches anew")
        tunnel = Tunnel(container.pipes, self._bounds.way_out(entry.record))
        try:
            if await self.runtime.state(container) == "gone":
                return False
            await self.runtime.bound(container)
            await self._thaw(entry)
            await tunnel.attach()
        except (EngineError, OSError) as error:
            log.error("Sandbox %s lives but can't be reached: %s", entry.record.id, error)
            tunnel.detach("the guest did not answer")
        else:
            entry.tunnel = tunnel
        self._runs(entry)
        return True

    async def end(self, entry: Entry, reason: str) -> None:
        """End the sandbox, running or paused, and remove all of it."""
        entry.phase = "gone"
        # The record goes first: what a crash leaves of the rest, the next engine sweeps.
        (self._directory(entry) / RECORD).unlink(missing_ok=True)
        await self._end_run(entry, reason)
        await _remove(self._directory(entry))
        await _remove(self.snapshots / entry.record.id)

    async def drop_run(self, entry: Entry) -> None:
        """Make sure that nothing of a paused sandbox's last run is alive."""
        await self._end_run(entry, "the sandbox is paused")

    async def aclose(self) -> None:
        """Wait for what goes on behind answered calls."""
        await self._writing.aclose()
        await self.runtime.aclose()

    def leave(self, entry: Entry) -> None:
        """Let go of a running sandbox and leave it to the next engine."""
        self._let_go(entry, "the engine stopped")

    async def save(self, entry: Entry) -> None:
        """Write the record durably.

        Raises:
            EngineError: The disk is full or failing; what was written before is still there.
        """
        with _disk_errors("record", entry):
            self._directory(entry).mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(entry.record.save, self._directory(entry))

    def _directory(self, entry: Entry) -> Path:
        return self.sandboxes / entry.record.id

    def _snapshot(self, entry: Entry) -> Path:
        return self.snapshots / entry.record.id / str(entry.record.snapshot)

    async def _reboot(self, entry: Entry) -> None:
        """Through a tunnel of its own: the sandbox's is cut, so that nobody begins anything meanwhile."""
        tunnel = Tunnel(self.container(entry).pipes)
        try:
            if entry.record.frozen:
                await self._thaw(entry)
            await tunnel.attach()
            await reboot(tunnel, sandbox_id=entry.record.id, token=entry.record.token)
        finally:
            tunnel.detach("the sandbox is being rebooted")

    async def _write_snapshot(
        self, entry: Entry, final: Path, description: str | None = None, *, wanted: asyncio.Event
    ) -> snapshots.Manifest:
        container = self.container(entry)
        # Frozen first, so that nothing runs on between the image and the end of the container.
        if not entry.record.frozen:
            await self.runtime.freeze(container)
        return await self._writing.write(container, final, wanted=wanted, description=description)

    async def _go_on(self, entry: Entry, snapshot: Path) -> bool:
        """Let a sandbox that could not be paused run on; whether it still can."""
        if not await self.adopt(entry):
            await self.end(entry, "it ended while it was being paused")
            return False

        # The failed pause may have got as far as the record, which then needs its snapshot until it is put right.
        with contextlib.suppress(EngineError):
            await self.save(entry)
            await _remove(snapshot)
        return True

    async def _start_run(self, entry: Entry, image: Path) -> Tunnel:
        """A new container from an image, with the tunnel attached."""
        template = templates.load(self._template_directory, entry.record.template)
        container = self.container(entry)
        await _remove(container.directory)
        with _disk_errors("container", entry):
            container.directory.mkdir(parents=True)
            write_bundle(container.bundle, self._bounds.applied(template.config(container)))
            container.pipes.make()
        entry.tunnel = Tunnel(container.pipes, self._bounds.way_out(entry.record))
        entry.tunnel.open_pipes()
        async with self._store.opened(image, cpu=templates.cpu()) as plain:
            await self.runtime.restore(container, plain)
        await entry.tunnel.attach()
        return entry.tunnel

    async def _end_run(self, entry: Entry, reason: str) -> None:
        self._let_go(entry, reason)
        container = self.container(entry)
        await self.runtime.kill(container)
        await _remove(container.directory)

    def _let_go(self, entry: Entry, reason: str) -> None:
        """Cut all traffic: new requests find no tunnel, then those in flight break."""
        tunnel, entry.tunnel = entry.tunnel, None
        watch, entry.watch = entry.watch, None
        if watch is not None:
            watch.cancel()
        if tunnel is not None:
            tunnel.detach(reason)

    async def _thaw(self, entry: Entry) -> None:
        await self.runtime.thaw(self.container(entry))
        if entry.record.frozen:
            await self._mark(entry, frozen=False)

    async def _mark(self, entry: Entry, *, frozen: bool) -> None:
        """Known at once, then written; where that fails the next engine asks the container, which knows."""
        entry.record = entry.record.turned(self._now(), frozen=frozen)
        with contextlib.suppress(EngineError):
            await self.save(entry)

    def _runs(self, entry: Entry) -> None:
        entry.phase = "running"
        entry.watch = asyncio.create_task(self._watch(entry, self.container(entry)))

    async def _watch(self, entry: Entry, container: Container) -> None:
        await self.runtime.wait(container)
        self._on_end(entry, container)


async def _remove(directory: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(what: str, entry: Entry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"The {what} of sandbox {entry.record.id} can't be written: {error.strerror}. Free some disk space."
        raise EngineError(msg, sandbox_id=entry.record.id) from error
