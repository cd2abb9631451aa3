"""One run of a sandbox: its container, alive or standing still, and the tunnel into it. The caller holds its lock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from sandbox_tools.engine import templates
from sandbox_tools.engine.bounds import Bounds
from sandbox_tools.engine.bundle import write_bundle
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.guest_calls import check_health, reboot
from sandbox_tools.engine.images.store import Store
from sandbox_tools.engine.images.writing import Writing
from sandbox_tools.engine.runtime import Container, Runtime
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.errors import EngineError, ServerError

log = logging.getLogger(__name__)


class Runs:
    """The runs of an engine's sandboxes.

    Args:
        state: The engine's state directory.
        template_directory: Where the templates are.
        store: Where images are read.
        writing: What writes them.
        bounds: What each sandbox may take at most, and reach.
        now: The wall clock.
        on_end: Told of a sandbox whose container ended by itself.
    """

    def __init__(
        self,
        state: Path,
        template_directory: Path,
        runtime: Runtime,
        store: Store,
        writing: Writing,
        *,
        bounds: Bounds,
        now: Callable[[], datetime],
        on_end: Callable[[Entry, Container], None],
    ) -> None:
        self.sandboxes = state / "sandboxes"
        self.snapshots = state / "snapshots"
        self.runtime = runtime
        self._store = store
        self._writing = writing
        self._bounds = bounds
        self._template_directory = template_directory
        self._now = now
        self._on_end = on_end

    def container(self, entry: Entry) -> Container:
        """The container of the sandbox's current run; every resume makes a new one."""
        record = entry.record
        return Container(
            id=f"{record.id}-{record.run}",
            directory=self.directory(entry) / f"run-{record.run}",
            binary=self._template_directory / "runsc" / record.runsc,
        )

    def resident_bytes(self, entry: Entry) -> int:
        """RAM that the sandbox holds on the host now; 0 if it is gone."""
        return self.runtime.resident_bytes(self.container(entry))

    async def start_run(self, entry: Entry, image: Path) -> Tunnel:
        """A new container from an image, with the tunnel attached.

        Raises:
            EngineError: The image can't be opened, or the container not be brought up; what there is of it, is left.
        """
        template = templates.load(self._template_directory, entry.record.template)
        container = self.container(entry)
        await remove(container.directory)
        with disk_errors("container", entry):
            container.directory.mkdir(parents=True)
            write_bundle(container.bundle, self._bounds.applied(template.config(container)))
            container.pipes.make()
        entry.tunnel = Tunnel(container.pipes, self._bounds.way_out(entry))
        entry.tunnel.open_pipes()
        async with self._store.opened(image, cpu=templates.cpu()) as plain:
            await self.runtime.restore(container, plain)
        await entry.tunnel.attach()
        return entry.tunnel

    async def end_run(self, entry: Entry, reason: str) -> None:
        """End its container, and remove it; traffic under way breaks for that reason."""
        self.let_go(entry, reason)
        await self.end_container(self.container(entry))

    async def end_container(self, container: Container) -> None:
        """End it, and remove what it had."""
        await self.runtime.kill(container)
        await remove(container.directory)

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
                self.runs(entry)
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
        self.let_go(entry, "the sandbox is being rebooted")
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
        self.let_go(entry, "the engine attaches anew")
        tunnel = Tunnel(container.pipes, self._bounds.way_out(entry))
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
        self.runs(entry)
        return True

    def leave(self, entry: Entry) -> None:
        """Let go of a running sandbox and leave it to the next engine."""
        self.let_go(entry, "the engine stopped")

    async def save(self, entry: Entry) -> None:
        """Write the record durably.

        Raises:
            EngineError: The disk is full or failing; what was written before is still there.
        """
        with disk_errors("record", entry):
            self.directory(entry).mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(entry.record.save, self.directory(entry))

    def directory(self, entry: Entry) -> Path:
        """Where its record and its run are."""
        return self.sandboxes / entry.record.id

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

    def let_go(self, entry: Entry, reason: str) -> None:
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

    def runs(self, entry: Entry) -> None:
        """It is up: from here on its end is watched for."""
        entry.phase = "running"
        entry.watch = asyncio.create_task(self._watch(entry, self.container(entry)))

    async def _watch(self, entry: Entry, container: Container) -> None:
        await self.runtime.wait(container)
        self._on_end(entry, container)


async def remove(directory: Path) -> None:
    """Remove a directory with all that is in it; one that is gone is no error."""
    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(what: str, entry: Entry) -> Iterator[None]:
    """Say in words that a sandbox's `what` could not be written."""
    try:
        yield
    except OSError as error:
        msg = f"The {what} of sandbox {entry.record.id} can't be written: {error.strerror}. Free some disk space."
        raise EngineError(msg, sandbox_id=entry.record.id) from error
