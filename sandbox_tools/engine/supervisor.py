"""Sandboxes by id: who may do what to which when, their deadlines, and what to do with what a crash left."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from sandbox_tools.engine import snapshots
from sandbox_tools.engine.deadlines import Deadlines
from sandbox_tools.engine.lifecycle import Entry, Lifecycle
from sandbox_tools.engine.records import TRAFFIC_SECONDS, Record, new_id, new_run
from sandbox_tools.engine.runtime import Container, Runtime
from sandbox_tools.engine.templates import Template
from sandbox_tools.errors import ConfigError, ConflictError, EngineError, NotFoundError
from sandbox_tools.models import DEFAULT_TEMPLATE, DEFAULT_TIMEOUT, CreateRequest, SandboxInfo

log = logging.getLogger(__name__)

MAX_TIMEOUT = 24 * 3600
"""Seconds; the longest that E2B's larger plan allows."""

TEMPLATE_NAMES = frozenset({"base", DEFAULT_TEMPLATE})

# After a pause at the deadline failed (a full disk, say) the sandbox runs on, and the pause is tried again.
_RETRY = timedelta(seconds=30)

# How many sandboxes that ended are remembered with the reason why.
_REMEMBERED = 1000

T = TypeVar("T")


class Supervisor:
    """All sandboxes of one state directory.

    Transitions run to their end in tasks of their own, whatever becomes of the request that asked for them: half a
    pause is no state.

    Args:
        state: The engine's state directory.
        template_directory: Where the templates are.
        template: What new sandboxes are made from.
        runtime: What isolates them.
        now: The wall clock.
    """

    def __init__(
        self,
        state: Path,
        template_directory: Path,
        template: Template,
        runtime: Runtime,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._lifecycle = Lifecycle(state, template_directory, runtime, now=now, on_end=self._on_end)
        self._runtime = runtime
        self._template = template
        self._now = now
        self._entries: dict[str, Entry] = {}
        self._ended: dict[str, str] = {}
        self._transitions: set[asyncio.Task[Any]] = set()
        self._deadlines = Deadlines(self._running, now=now, on_end=self._on_deadline)

    # What the routes call.

    async def create(self, request: CreateRequest) -> Entry:
        """A new sandbox, restored from its template's image.

        Raises:
            NotFoundError: There is no such template.
            ConfigError: The timeout is out of range.
            EngineError: It could not be started; nothing of it is left.
        """
        if request.template_id not in TEMPLATE_NAMES:
            msg = f"Template {request.template_id!r} not found. This engine has {sorted(TEMPLATE_NAMES)}."
            raise NotFoundError(msg, op="create")

        timeout = _checked(request.timeout, "create")
        return await self._carry_out(self._create(request, timeout))

    async def connect(self, sandbox_id: str, timeout: int | None) -> tuple[Entry, bool]:
        """The sandbox, running for at least `timeout` more seconds, and whether it had to be resumed."""
        seconds = timedelta(seconds=_checked(timeout, "connect"))
        entry = self.entry(sandbox_id)
        return await self._carry_out(self._connect(entry, seconds))

    async def resume(self, sandbox_id: str, timeout: int | None) -> Entry:
        """As `connect`, but a sandbox that runs already is a conflict."""
        if self.entry(sandbox_id).phase == "running":
            msg = f"Sandbox {sandbox_id} is already running"
            raise ConflictError(msg, op="resume", sandbox_id=sandbox_id)

        return (await self.connect(sandbox_id, timeout))[0]

    async def pause(self, sandbox_id: str) -> None:
        """Memory, processes and files on disk, RAM free; joins a pause in progress.

        Raises:
            ConflictError: It was paused before this call.
            EngineError: It could not be written; the message says what became of the sandbox.
        """
        entry = self.entry(sandbox_id)
        if entry.phase == "paused":
            msg = f"Sandbox {sandbox_id} is already paused"
            raise ConflictError(msg, op="pause", sandbox_id=sandbox_id)

        await self._carry_out(self._pause(entry))

    async def kill(self, sandbox_id: str) -> None:
        """End it, running or paused, and remove what is on disk; waits for a transition in progress."""
        await self._carry_out(self._kill(self.entry(sandbox_id)))

    async def set_timeout(self, sandbox_id: str, timeout: int) -> None:
        """Let it end `timeout` seconds from now, sooner or later than it would have; 0 ends it now."""
        _checked(timeout or None, "set_timeout")
        entry = self.entry(sandbox_id)
        if entry.phase in ("pausing", "resuming"):
            msg = f"Sandbox {sandbox_id} is {entry.phase}. Try again in a moment."
            raise ConflictError(msg, op="set_timeout", sandbox_id=sandbox_id)

        await self._carry_out(self._set_timeout(entry, timedelta(seconds=timeout)))

    def entry(self, sandbox_id: str) -> Entry:
        """The sandbox of that id.

        Raises:
            NotFoundError: There is none, or it is being killed; the message says how it ended, where that is known.
        """
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.phase == "gone":
            raise self._unknown(sandbox_id)
        return entry

    async def for_traffic(self, sandbox_id: str) -> Entry:
        """The sandbox, running and with a tunnel; one that sleeps is resumed where its record says so.

        Raises:
            NotFoundError: There is none, or it sleeps and traffic does not wake it.
            ConflictError: It is on its way to such a sleep.
            EngineError: It could not be resumed or reached.
        """
        entry = self.entry(sandbox_id)
        if entry.phase == "running" and entry.tunnel is not None and entry.tunnel.attached:
            return entry

        if entry.phase == "pausing" and not entry.record.wakes:
            msg = f"Sandbox {sandbox_id} is being paused. Connect to it to resume it."
            raise ConflictError(msg, op="connect", sandbox_id=sandbox_id)

        # Looked at here as well: the lock may be held for long by a transition that this must not wait for.
        self._check_awake(entry)
        await self._carry_out(self._wake(entry))
        return entry

    def entries(self) -> list[Entry]:
        """All sandboxes, whatever they are doing."""
        return self._there()

    def infos(self) -> list[SandboxInfo]:
        """A row for each sandbox."""
        return [entry.record.info(pausing=entry.phase == "pausing") for entry in self._there()]

    def info(self, sandbox_id: str) -> SandboxInfo:
        """One row, with what the sandbox holds in memory."""
        entry = self.entry(sandbox_id)
        resident = self._runtime.resident_bytes(self._lifecycle.container(entry)) if entry.tunnel else 0
        return entry.record.info(resident_bytes=resident, pausing=entry.phase == "pausing")

    @property
    def running(self) -> int:
        """How many sandboxes are not simply paused."""
        return sum(entry.phase != "paused" for entry in self._there()) + len(self._transitions)

    # The engine's own beginning and end.

    async def start(self) -> None:
        """Take over what an earlier engine left: adopt what runs, keep what is paused, remove what is neither."""
        await self._runtime.settle()
        for directory in (self._lifecycle.sandboxes, self._lifecycle.snapshots):
            # What sandboxes hold in memory lies here: it is their owner's only.
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in self._lifecycle.sandboxes.iterdir():
            record = Record.load(directory)
            if record is not None:
                self._entries[record.id] = Entry(record, record.state)
        await asyncio.gather(*(self._take_over(entry) for entry in list(self._entries.values())))
        await self._sweep()
        self._deadlines.start()

    async def stop(self) -> None:
        """Pause everything that runs, so that neither memory nor state is left behind; what can't be paused runs on."""
        self._deadlines.stop()
        while self._transitions:
            await asyncio.wait(self._transitions)
        running = self._running()
        outcomes = await asyncio.gather(*(self._pause(entry) for entry in running), return_exceptions=True)
        for entry, outcome in zip(running, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                log.error("Sandbox %s is left running for the next engine: %s", entry.record.id, outcome)
                self._lifecycle.leave(entry)
        await self._runtime.aclose()

    # Transitions, under the sandbox's lock.

    async def _create(self, request: CreateRequest, timeout: int) -> Entry:
        now = self._now()
        record = Record(
            id=new_id(),
            template=self._template.id,
            template_name=request.template_id,
            runsc=self._template.runsc.name,
            state="running",
            run=new_run(),
            started_at=now,
            end_at=now + timedelta(seconds=timeout),
            auto_pause=request.auto_pause,
            auto_resume=request.auto_resume is not None and request.auto_resume.enabled,
            secure=request.secure,
            token=secrets.token_hex(24),
            memory_mb=self._template.memory_mb,
            metadata=request.metadata,
            timeout=timeout,
        )
        entry = Entry(record, "resuming")
        await self._lifecycle.create(entry, request.env_vars)
        self._entries[record.id] = entry
        self._deadlines.changed()
        return entry

    async def _connect(self, entry: Entry, seconds: timedelta) -> tuple[Entry, bool]:
        async with entry.lock:
            self._check_there(entry)
            end = self._now() + seconds
            if entry.phase == "paused":
                await self._lifecycle.resume(entry, end)
                self._deadlines.changed()
                return entry, True

            await self._reach(entry)
            # Never shortened, and exactly as it was where it is not extended: clients compare it.
            if end > entry.record.end_at:
                await self._set_end(entry, end)
            return entry, False

    async def _wake(self, entry: Entry) -> None:
        async with entry.lock:
            self._check_there(entry)
            self._check_awake(entry)
            if entry.phase == "paused":
                seconds = min(max(entry.record.timeout, TRAFFIC_SECONDS), MAX_TIMEOUT)
                await self._lifecycle.resume(entry, self._now() + timedelta(seconds=seconds))
                self._deadlines.changed()
            else:
                await self._reach(entry)

    async def _reach(self, entry: Entry) -> None:
        """Have a tunnel to a sandbox that runs."""
        if entry.tunnel is None or not entry.tunnel.attached:
            await self._lifecycle.adopt(entry)
            if entry.tunnel is None:
                msg = f"Sandbox {entry.record.id} runs but can't be reached now. Try again in a moment."
                raise EngineError(msg, op="connect", sandbox_id=entry.record.id)

    async def _set_timeout(self, entry: Entry, seconds: timedelta) -> None:
        async with entry.lock:
            if entry.phase != "running":
                raise self._unknown(entry.record.id)
            await self._set_end(entry, self._now() + seconds)

    async def _pause(self, entry: Entry) -> None:
        async with entry.lock:
            self._check_there(entry)
            # A call that came during a pause finds it done and has joined it.
            if entry.phase == "running":
                await self._pause_locked(entry)

    async def _pause_locked(self, entry: Entry) -> None:
        try:
            await self._lifecycle.pause(entry)
        finally:
            if entry.phase == "gone":
                self._remember(entry, "it ended while it was being paused")
                self._entries.pop(entry.record.id, None)

    async def _kill(self, entry: Entry) -> None:
        async with entry.lock:
            self._check_there(entry)
            await self._end(entry, "it was killed")

    async def _expire(self, entry: Entry, retry_at: datetime) -> None:
        async with entry.lock:
            # Somebody may have extended it while this waited for the lock.
            if entry.phase != "running" or entry.record.end_at != retry_at:
                return

            if not entry.record.auto_pause:
                await self._end(entry, "its timeout was reached")
                return

            try:
                await self._pause_locked(entry)
            except EngineError as error:
                log.error("%s", error)

    async def _lost(self, entry: Entry, container: Container) -> None:
        async with entry.lock:
            if entry.phase != "running" or self._lifecycle.container(entry) != container:
                return

            needed = f"most likely it needed more than its {entry.record.memory_mb} MB of memory"
            log.error("Sandbox %s ended by itself; %s", entry.record.id, needed)
            await self._end(entry, f"it ended by itself; {needed}")

    async def _end(self, entry: Entry, reason: str) -> None:
        # Remembered first: from here on whoever asks is told that it is gone, and why.
        self._remember(entry, reason)
        await self._lifecycle.end(entry, reason)
        self._entries.pop(entry.record.id, None)

    async def _set_end(self, entry: Entry, end: datetime) -> None:
        before = entry.record
        entry.record = before.model_copy(update={"end_at": end})
        try:
            await self._lifecycle.save(entry)
        except EngineError:
            entry.record = before
            raise
        self._deadlines.changed()

    # What a crash left.

    async def _take_over(self, entry: Entry) -> None:
        if entry.phase == "paused":
            # The earlier engine may have died after the snapshot was the truth and before the container was gone.
            await self._lifecycle.drop_run(entry)
            return

        if not await self._lifecycle.adopt(entry):
            reason = "it ended while no engine was there to watch it, or the machine was restarted"
            log.error("Sandbox %s is lost: %s", entry.record.id, reason)
            await self._end(entry, reason)

    async def _sweep(self) -> None:
        """Remove what no record speaks of: containers, directories and half-written snapshots."""
        running = {self._lifecycle.container(entry).id for entry in self._there() if entry.phase == "running"}
        for container_id in self._runtime.known():
            if container_id not in running:
                sandbox_id, _, run = container_id.rpartition("-")
                directory = self._lifecycle.sandboxes / sandbox_id / f"run-{run}"
                await self._runtime.kill(Container(id=container_id, directory=directory, binary=self._template.runsc))
        for parent in (self._lifecycle.sandboxes, self._lifecycle.snapshots):
            for directory in parent.iterdir():
                if directory.name not in self._entries:
                    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        for entry in self._there():
            snapshots.sweep(self._lifecycle.snapshots / entry.record.id)

    # Small things.

    def _on_deadline(self, entry: Entry) -> None:
        entry.record = entry.record.model_copy(update={"end_at": self._now() + _RETRY})
        self._spawn(self._expire(entry, entry.record.end_at))

    def _running(self) -> list[Entry]:
        return [entry for entry in self._there() if entry.phase == "running"]

    def _on_end(self, entry: Entry, container: Container) -> None:
        self._spawn(self._lost(entry, container))

    def _there(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.phase != "gone"]

    def _check_there(self, entry: Entry) -> None:
        if entry.phase == "gone":
            raise self._unknown(entry.record.id)

    def _check_awake(self, entry: Entry) -> None:
        if entry.phase == "paused" and not entry.record.wakes:
            msg = f"Sandbox {entry.record.id} is paused and traffic does not wake it. Connect to it to resume it."
            raise NotFoundError(msg, op="connect", sandbox_id=entry.record.id)

    def _unknown(self, sandbox_id: str) -> NotFoundError:
        msg = f"Sandbox {sandbox_id!r} doesn't exist or you don't have access to it"
        if reason := self._ended.get(sandbox_id):
            msg += f": {reason}"
        return NotFoundError(msg, sandbox_id=sandbox_id)

    def _remember(self, entry: Entry, reason: str) -> None:
        self._ended[entry.record.id] = reason
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._transitions.add(task)
        task.add_done_callback(self._transitions.discard)
        return task

    async def _carry_out(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._spawn(work))


def _checked(timeout: int | None, op: str) -> int:
    if timeout is None:
        return DEFAULT_TIMEOUT
    if timeout <= 0:
        msg = "Timeout must be greater than 0"
        raise ConfigError(msg, op=op)
    if timeout > MAX_TIMEOUT:
        msg = f"Timeout cannot be greater than {MAX_TIMEOUT // 3600} hours"
        raise ConfigError(msg, op=op)
    return timeout
