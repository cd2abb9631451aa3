"""The engine's sandboxes, as everybody else calls them: what is refused at once, and what is carried out to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from sandbox_tools.engine import idempotency, recovery
from sandbox_tools.engine.bodies import MAX_TIMEOUT, NewSandbox
from sandbox_tools.engine.bounds import Bounds
from sandbox_tools.engine.building.names import Names, leave_user
from sandbox_tools.engine.deadlines import Deadlines
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.history import History
from sandbox_tools.engine.images.quota import Quota
from sandbox_tools.engine.images.saved import Saved
from sandbox_tools.engine.images.store import Store
from sandbox_tools.engine.images.writing import Writing
from sandbox_tools.engine.journal import Journal
from sandbox_tools.engine.lifecycle import Lifecycle
from sandbox_tools.engine.metering import Metering
from sandbox_tools.engine.pool import Pool
from sandbox_tools.engine.records import IdempotencyMark
from sandbox_tools.engine.retention import DEFAULT_DAYS, Retention
from sandbox_tools.engine.runtime import Container, Runtime
from sandbox_tools.engine.sandboxes import Sandboxes
from sandbox_tools.engine.templates import Template
from sandbox_tools.engine.transitions import Transitions
from sandbox_tools.errors import ConfigError, ConflictError, NotFoundError
from sandbox_tools.models import DEFAULT_TEMPLATE, DEFAULT_TIMEOUT

log = logging.getLogger(__name__)

# The least that a refresh gives (PROTOCOL.md section 2.2).
_LEAST_REFRESH = 15

# After a pause at the deadline failed (a full disk, say) the sandbox runs on, and the pause is tried again.
_RETRY = timedelta(seconds=30)

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
        store: Where their images are. None: in files as they are.
        bounds: What each sandbox may take at most, and reach. None: the defaults.
        max_sandboxes: How many may run at a time; paused ones don't count. None: no limit.
        retention_days: How long a paused sandbox is kept. 0: until it is killed.
        pool_size: How many sandboxes are kept ready that nobody has asked for yet.
        max_snapshot_bytes: What all snapshots together may take of the disk. None: what it has.
        keep_history: How many of its last pauses are kept of a sandbox that says nothing about it.
    """

    def __init__(
        self,
        state: Path,
        template_directory: Path,
        template: Template,
        runtime: Runtime,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        store: Store | None = None,
        bounds: Bounds | None = None,
        max_sandboxes: int | None = None,
        retention_days: float = DEFAULT_DAYS,
        pool_size: int = 0,
        max_snapshot_bytes: int | None = None,
        keep_history: int = 0,
    ) -> None:
        self.now = now
        self.sandboxes = Sandboxes(most=max_sandboxes)
        self.store = store or Store()
        self.bounds = bounds or Bounds()
        self.saved = Saved(state / "saved")
        self.quota = Quota(self.sandboxes.paused, self.saved, most=max_snapshot_bytes)
        self.lifecycle = Lifecycle(
            state,
            template_directory,
            runtime,
            self.store,
            Writing(runtime, self.store, self.quota),
            history=History(self.saved),
            bounds=self.bounds,
            now=now,
            on_end=self._on_end,
        )
        self.journal = Journal(self.lifecycle.sandboxes, now=now)
        self.metering = Metering(self.sandboxes.running, self.lifecycle.container, runtime, now=now)
        self._deadlines = Deadlines(self.sandboxes.running, now=now, on_end=self._on_deadline)
        self.retention = Retention(self.sandboxes.paused, days=retention_days, now=now, on_over=self._on_over)
        self.pool = Pool(self.lifecycle, template.origin(DEFAULT_TEMPLATE), size=pool_size, now=now)
        self.transitions = Transitions(
            self.sandboxes,
            self.lifecycle,
            self.saved,
            self.journal,
            self.metering,
            self.pool,
            on_deadline_moved=self._deadlines.changed,
            now=now,
            retention=self.retention,
            names=Names(template_directory),
        )
        self._runtime = runtime
        self._template = template
        self._keep_history = keep_history
        self._keys = idempotency.Keys(now=now)
        self._under_way: set[asyncio.Task[Any]] = set()

    # What the routes call.

    async def create(self, request: NewSandbox, key: str | None = None) -> Entry:
        """A new sandbox, restored from its template's image or from a snapshot.

        Args:
            key: Names the request: the same key gives the same sandbox. None: each request makes one.

        Raises:
            NotFoundError: There is no such template.
            ConfigError: The timeout is out of range, or settings contradict each other.
            RateLimitError: As many run as may.
            ConflictError: The sandbox of that key is gone.
            EngineError: It could not be started; nothing of it is left.
        """
        timeout, request = checked(request.timeout, "create"), self.bounds.granted(request)
        waking = request.auto_resume is not None and request.auto_resume.enabled
        if not request.auto_pause_memory and (not request.auto_pause or waking):
            msg = "`autoPauseMemory` is false: that needs `autoPause`, and excludes `autoResume`."
            raise ConfigError(msg, op="create")

        if request.keep_history is None:
            request = request.model_copy(update={"keep_history": self._keep_history})
        if key is None:
            return await self.carry_out(self.transitions.create(request, timeout, None))

        mark = IdempotencyMark(key=key, digest=idempotency.digest(request), at=self.now())

        def make() -> asyncio.Task[str]:
            return self._spawn(self.transitions.create_id(request, timeout, mark))

        sandbox_id = await self._keys.once(key, mark.digest, make)
        try:
            return self.entry(sandbox_id)
        except NotFoundError as error:
            raise self._keys.gone(key, error.message) from None

    async def connect(
        self, sandbox_id: str, timeout: int | None, *, memory: bool = True, changes: Mapping[str, Any] | None = None
    ) -> tuple[Entry, bool]:
        """The sandbox, running for at least `timeout` more seconds, and whether it had to be resumed.

        Args:
            memory: Without, one that was paused comes back as after a reboot.
            changes: Of its record, where it had to be resumed.
        """
        seconds = checked(timeout, "connect")
        entry = self.entry(sandbox_id)
        if entry.phase == "resuming" and not memory:
            msg = f"Sandbox {sandbox_id} is being resumed with its memory. Try again in a moment."
            raise ConflictError(msg, op="connect", sandbox_id=sandbox_id)

        return await self.carry_out(self.transitions.connect(entry, seconds, memory=memory, changes=changes or {}))

    async def resume(
        self, sandbox_id: str, timeout: int | None, *, memory: bool = True, changes: Mapping[str, Any] | None = None
    ) -> Entry:
        """As `connect`, but a sandbox that runs already, and does not stand still, is a conflict."""
        entry = self.entry(sandbox_id)
        if entry.phase == "running" and not entry.record.frozen:
            msg = f"Sandbox {sandbox_id} is already running"
            raise ConflictError(msg, op="resume", sandbox_id=sandbox_id)

        return (await self.connect(sandbox_id, timeout, memory=memory, changes=changes))[0]

    async def freeze(self, sandbox_id: str) -> None:
        """Stop its tasks and keep its RAM; whatever reaches it afterwards thaws it. One that is frozen stays so.

        Raises:
            ConflictError: Somebody is connected to it, or it does not run.
            EngineError: It could not be frozen, and runs on.
        """
        await self.carry_out(self.transitions.freeze(self._settled(sandbox_id, "freeze")))

    async def pause(self, sandbox_id: str, *, memory: bool = True, healthy: bool = False) -> None:
        """Memory, processes and files on disk, RAM free; joins a pause in progress.

        Args:
            memory: Without, its processes end and only its files are kept.
            healthy: Refuse where the guest does not answer.

        Raises:
            ConflictError: It was paused before this call.
            ServerError: 503, the guest does not answer.
            EngineError: It could not be written; the message says what became of the sandbox.
        """
        entry = self.entry(sandbox_id)
        if entry.phase == "paused":
            msg = f"Sandbox {sandbox_id} is already paused"
            raise ConflictError(msg, op="pause", sandbox_id=sandbox_id)

        await self.carry_out(self.transitions.pause(entry, memory=memory, healthy=healthy))

    async def reboot(self, sandbox_id: str, timeout: int | None) -> Entry:
        """The sandbox as after a reboot, running for at least `timeout` more seconds."""
        seconds = checked(timeout, "reset")
        return await self.carry_out(self.transitions.reboot(self.entry(sandbox_id), seconds))

    async def kill(self, sandbox_id: str) -> None:
        """End it, running or paused, and remove what is on disk; waits for a transition in progress."""
        await self.carry_out(self.transitions.kill(self.entry(sandbox_id)))

    async def set_timeout(self, sandbox_id: str, timeout: int) -> None:
        """Let it end `timeout` seconds from now, sooner or later than it would have; 0 ends it now.

        Raises:
            NotFoundError: It is paused, or there is none.
            ConflictError: It is on its way to or from a pause.
            ConfigError: It has run for as long as a sandbox may.
        """
        entry = self._settled(sandbox_id, "set_timeout")
        await self.carry_out(self.transitions.set_timeout(entry, timeout, shorten=True))

    async def refresh(self, sandbox_id: str, duration: int | None) -> None:
        """Let it live for at least `duration` more seconds; raises as `set_timeout` does."""
        seconds = max(duration or 0, _LEAST_REFRESH)
        entry = self._settled(sandbox_id, "set_timeout")
        await self.carry_out(self.transitions.set_timeout(entry, seconds, shorten=False))

    async def change(self, sandbox_id: str, changes: Mapping[str, Any]) -> None:
        """Change a sandbox's record for good."""
        await self.carry_out(self.transitions.change(self.entry(sandbox_id), changes))

    def entry(self, sandbox_id: str) -> Entry:
        """The sandbox of that id.

        Raises:
            NotFoundError: There is none, or it is being killed; the message says how it ended, where that is known.
        """
        return self.sandboxes.entry(sandbox_id)

    async def for_traffic(self, sandbox_id: str) -> Entry:
        """The sandbox, awake and with a tunnel; one that sleeps is resumed where its record says so.

        Until something is waited for after this, it stays awake: a stream that is begun at once keeps it so.

        Raises:
            NotFoundError: There is none, or it sleeps and traffic does not wake it.
            ConflictError: It is on its way to such a sleep.
            EngineError: It could not be resumed or reached.
        """
        entry = self.entry(sandbox_id)
        if entry.awake:
            return entry

        while True:
            if entry.phase == "shutting down" or (entry.phase == "pausing" and not entry.record.wakes):
                msg = f"Sandbox {sandbox_id} is being paused. Connect to it to resume it."
                raise ConflictError(msg, op="connect", sandbox_id=sandbox_id)

            # Looked at here as well: the lock may be held for long by a transition that this must not wait for.
            self.transitions.check_awake(entry)
            await self.carry_out(self.transitions.wake(entry))
            # It may have been frozen again before this had its turn.
            if not entry.record.frozen:
                return entry

    def entries(self) -> list[Entry]:
        """All sandboxes, whatever they are doing."""
        return self.sandboxes.all()

    @property
    def running(self) -> int:
        """How many sandboxes are not simply paused."""
        return sum(entry.phase != "paused" for entry in self.sandboxes.all()) + len(self._under_way)

    async def carry_out(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of a transition, which runs to its end whether or not its caller waits."""
        return await asyncio.shield(self._spawn(work))

    # The engine's own beginning and end.

    async def start(self) -> None:
        """Take over what an earlier engine left: adopt what runs, keep what is paused, remove what is neither."""
        await self._runtime.settle()
        await asyncio.to_thread(self.store.start)
        self.sandboxes.start(await asyncio.to_thread(recovery.find, self.lifecycle))
        unsettled = await asyncio.to_thread(recovery.unsettled, self.lifecycle, self.sandboxes.all())
        await asyncio.gather(*(self._take_over(entry) for entry in unsettled))
        await recovery.sweep(self.lifecycle, self.sandboxes.all(), self._template.runsc)
        await asyncio.to_thread(self.saved.start)
        await self.lifecycle.history.start({entry.record.id for entry in self.sandboxes.all()})
        self._keys.start(entry.record for entry in self.sandboxes.all())
        self._deadlines.start()
        self.retention.start()
        self.metering.start()
        self.pool.start()

    async def stop(self) -> None:
        """Pause everything that runs, so that neither memory nor state is left behind; what can't be paused runs on."""
        self._deadlines.stop()
        self.retention.stop()
        self.metering.stop()
        await self.pool.stop()
        while self._under_way:
            await asyncio.wait(self._under_way)
        running = self.sandboxes.running()
        outcomes = await asyncio.gather(
            *(self.transitions.pause(entry, for_good=True) for entry in running), return_exceptions=True
        )
        for entry, outcome in zip(running, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                log.error("Sandbox %s is left running for the next engine: %s", entry.record.id, outcome)
                self.lifecycle.leave(entry)
        await self.lifecycle.aclose()
        await asyncio.to_thread(self.store.stop)

    def leave_templates(self) -> None:
        """Have it known that nothing here needs a template, where that is so; for an engine that has stopped."""
        if not self.sandboxes.all() and not self.saved.all():
            leave_user(self.transitions.names.templates, self.lifecycle.sandboxes.parent)

    async def _take_over(self, entry: Entry) -> None:
        if not await recovery.take_over(self.lifecycle, entry):
            await self.transitions.end(entry, recovery.LOST)

    # Small things.

    def _on_deadline(self, entry: Entry) -> None:
        entry.record = entry.record.model_copy(update={"end_at": self.now() + _RETRY})
        self._spawn(self.transitions.expire(entry, entry.record.end_at))

    async def _on_over(self, entry: Entry) -> None:
        await self.carry_out(self.transitions.end_kept(entry))

    def _on_end(self, entry: Entry, container: Container) -> None:
        self._spawn(self.transitions.lost(entry, container))

    def _settled(self, sandbox_id: str, op: str) -> Entry:
        entry = self.entry(sandbox_id)
        if entry.phase not in ("running", "paused"):
            msg = f"Sandbox {sandbox_id} is {entry.phase}. Try again in a moment."
            raise ConflictError(msg, op=op, sandbox_id=sandbox_id)
        return entry

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task


def checked(timeout: int | None, op: str) -> int:
    """A timeout in seconds; None is the server's default.

    Raises:
        ConfigError: It is out of range.
    """
    if timeout is None:
        return DEFAULT_TIMEOUT
    if timeout <= 0:
        msg = "Timeout must be greater than 0"
        raise ConfigError(msg, op=op)
    if timeout > MAX_TIMEOUT:
        msg = f"Timeout cannot be greater than {MAX_TIMEOUT // 3600} hours"
        raise ConfigError(msg, op=op)
    return timeout
