"""What is done to one sandbox at a time, each under its lock and to its end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sandbox_tools.engine.bodies import MAX_TIMEOUT, NewSandbox
from sandbox_tools.engine.building.builds import BUILT_IN
from sandbox_tools.engine.building.names import Names, used
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.saved import Origin, Saved, normalised
from sandbox_tools.engine.journal import Journal
from sandbox_tools.engine.lifecycle import Lifecycle
from sandbox_tools.engine.metering import Metering
from sandbox_tools.engine.pool import Pool
from sandbox_tools.engine.records import TRAFFIC_SECONDS, IdempotencyMark, Record, new_record
from sandbox_tools.engine.retention import Retention
from sandbox_tools.engine.runtime import Container
from sandbox_tools.engine.sandboxes import Sandboxes
from sandbox_tools.engine.templates import load
from sandbox_tools.errors import ConfigError, ConflictError, EngineError, NotFoundError

log = logging.getLogger(__name__)

TEMPLATE_NAMES = BUILT_IN

_TEMPLATE_TAGS = frozenset({"default", "latest"})


class Transitions:
    """Everything that changes what a sandbox is doing.

    Args:
        sandboxes: Where a new one is entered, and one that ends is taken from.
        pool: What is kept ready of the template that sandboxes are made from where nothing else is said.
        on_deadline_moved: Told whenever a sandbox begins to run or its end moves.
        now: The wall clock.
        retention: How long what is paused is kept.
        names: What templates of one's own are called.
    """

    def __init__(
        self,
        sandboxes: Sandboxes,
        lifecycle: Lifecycle,
        saved: Saved,
        journal: Journal,
        metering: Metering,
        pool: Pool,
        *,
        on_deadline_moved: Callable[[], None],
        now: Callable[[], datetime],
        retention: Retention,
        names: Names,
    ) -> None:
        self._sandboxes = sandboxes
        self._lifecycle = lifecycle
        self._saved = saved
        self._journal = journal
        self._metering = metering
        self._pool = pool
        self._on_deadline_moved = on_deadline_moved
        self._now = now
        self._retention = retention
        self.names = names

    @asynccontextmanager
    async def standing(self, entry: Entry, op: str) -> AsyncIterator[None]:
        """Holds a running sandbox, so that nothing else is done to it meanwhile.

        Raises:
            ConflictError: It is paused.
        """
        async with entry.lock:
            self._sandboxes.check_there(entry)
            if entry.phase != "running":
                msg = f"Sandbox {entry.record.id} is {entry.phase}. Connect to it first."
                raise ConflictError(msg, op=op, sandbox_id=entry.record.id)
            yield

    async def begin(self, record: Record, origin: Origin, env: Mapping[str, str] | None) -> Entry:
        """Bring up a new sandbox, under another id where one was kept ready. Raises as `create` does."""
        # Until its record is written, nothing else says that its template is needed.
        with self._sandboxes.beginning():
            async with used(self.names.templates):
                entry = await self._from_pool(record, origin, env)
                if entry is None:
                    entry = Entry(record, "resuming")
                    await self._lifecycle.create(entry, origin, env)
            self._sandboxes.enter(entry)
        self._journal.note(entry.record.id, f"created from {origin.name}", template=origin.name)
        self._on_deadline_moved()
        return entry

    async def _from_pool(self, record: Record, origin: Origin, env: Mapping[str, str] | None) -> Entry | None:
        entry = await self._pool.take(origin, record)
        if entry is not None:
            try:
                await self._lifecycle.create(entry, origin, env)
            except EngineError as error:
                log.warning("A sandbox that was kept ready was of no use, and another is made: %s", error)
                return None
        return entry

    async def change(self, entry: Entry, changes: Mapping[str, Any]) -> None:
        """Change a sandbox's record for good."""
        async with entry.lock:
            self._sandboxes.check_there(entry)
            await self._change(entry, changes)

    async def create(self, request: NewSandbox, timeout: int, mark: IdempotencyMark | None) -> Entry:
        reference = normalised(request.template_id, "create")
        name, _, tag = reference.partition(":")
        if tag in _TEMPLATE_TAGS and (origin := self._of_template(name)) is not None:
            record = new_record(origin, now=self._now(), timeout=timeout, request=request, mark=mark)
            return await self.begin(record, origin, request.env_vars)

        snapshot = self._saved.find(reference)
        if snapshot is None:
            msg = f"Template {request.template_id!r} not found. This engine has {self.names.every()} and snapshots."
            raise NotFoundError(msg, op="create")

        async with self._saved.used(snapshot) as origin:
            record = new_record(origin, now=self._now(), timeout=timeout, request=request, mark=mark)
            # Without variables of its own it has those of what the snapshot was taken of.
            return await self.begin(record, origin, request.env_vars or None)

    def _of_template(self, name: str) -> Origin | None:
        """What sandboxes of a template are made from. None: there is no such template."""
        if name in TEMPLATE_NAMES:
            return replace(self._pool.origin, name=name)
        own = self.names.find(name)
        return None if own is None else load(self.names.templates, own.template).origin(name)

    async def create_id(self, request: NewSandbox, timeout: int, mark: IdempotencyMark) -> str:
        return (await self.create(request, timeout, mark)).record.id

    async def connect(
        self, entry: Entry, seconds: int, *, memory: bool, changes: Mapping[str, Any]
    ) -> tuple[Entry, bool]:
        # What is to be changed is changed by a resume, and what comes back without its memory has to be gone first.
        async with entry.claimed(wanted=memory and not changes):
            self._sandboxes.check_there(entry)
            if entry.phase == "paused":
                await self._resume(entry, seconds, memory=memory, changes=changes)
                return entry, True

            await self._reach(entry)
            await self._extend(entry, seconds)
            return entry, False

    async def wake(self, entry: Entry) -> None:
        async with entry.claimed():
            self._sandboxes.check_there(entry)
            self.check_awake(entry)
            if entry.phase == "paused":
                await self._resume(entry, _woken_for(entry))
            else:
                await self._reach(entry)
                # A pause at its timeout that was given up for this would begin again at once.
                if entry.record.end_at <= self._now():
                    await self._extend(entry, _woken_for(entry))

    async def _resume(
        self, entry: Entry, seconds: int, *, memory: bool = True, changes: Mapping[str, Any] | None = None
    ) -> None:
        if self._retention.over(entry):
            await self._end_kept(entry)
            raise self._sandboxes.unknown(entry.record.id)
        self._sandboxes.check_room("connect")
        rebooted = not (memory and entry.record.pause_memory)
        await self._lifecycle.resume(entry, timedelta(seconds=seconds), memory=memory, changes=changes or {})
        self._journal.note(entry.record.id, "resumed without its memory" if rebooted else "resumed")
        self._on_deadline_moved()

    async def freeze(self, entry: Entry) -> None:
        async with entry.lock:
            self._sandboxes.check_there(entry)
            if entry.phase != "running":
                msg = f"Sandbox {entry.record.id} is {entry.phase}, and only a running one can be frozen."
                raise ConflictError(msg, op="freeze", sandbox_id=entry.record.id)
            if entry.record.frozen:
                return
            if entry.tunnel is not None and (ports := entry.tunnel.in_use):
                where = ", ".join(map(str, sorted(ports)))
                msg = f"Sandbox {entry.record.id} is in use: connections are open (port {where}). Try again afterwards."
                raise ConflictError(msg, op="freeze", sandbox_id=entry.record.id)

            try:
                await self._lifecycle.freeze(entry)
            except EngineError:
                await self._reach(entry)
                raise
            self._journal.note(entry.record.id, "frozen", level="debug")

    async def _reach(self, entry: Entry) -> None:
        """Have a sandbox that runs awake and with a tunnel."""
        if entry.awake:
            return

        frozen = entry.record.frozen
        if not await (self._lifecycle.thaw(entry) if frozen else self._lifecycle.adopt(entry)):
            await self.end(entry, _by_itself(entry))
            raise self._sandboxes.unknown(entry.record.id)

        if entry.tunnel is None:
            msg = f"Sandbox {entry.record.id} runs but can't be reached now. Try again in a moment."
            raise EngineError(msg, op="connect", sandbox_id=entry.record.id)

        if frozen:
            self._journal.note(entry.record.id, "thawed", level="debug")

    async def set_timeout(self, entry: Entry, seconds: int, *, shorten: bool) -> None:
        async with entry.lock:
            if entry.phase != "running":
                raise self._sandboxes.unknown(entry.record.id)
            if shorten:
                await self._change(entry, {"end_at": self._end_in(entry, seconds)})
            else:
                await self._extend(entry, seconds)

    async def _extend(self, entry: Entry, seconds: int) -> None:
        # Never shortened, and exactly as it was where it is not extended: clients compare it.
        end = self._end_in(entry, seconds)
        if end > entry.record.end_at:
            await self._change(entry, {"end_at": end})

    def _end_in(self, entry: Entry, seconds: int) -> datetime:
        now, last = self._now(), entry.record.started_at + timedelta(seconds=MAX_TIMEOUT)
        if now >= last:
            msg = (
                f"Max instance length exceeded: a sandbox runs for {MAX_TIMEOUT // 3600} hours at most. Pause it first."
            )
            raise ConfigError(msg, op="set_timeout", sandbox_id=entry.record.id)
        return min(now + timedelta(seconds=min(seconds, MAX_TIMEOUT)), last)

    async def pause(self, entry: Entry, *, memory: bool = True, healthy: bool = False, for_good: bool = False) -> None:
        async with entry.lock:
            self._sandboxes.check_there(entry)
            # A call that came during a pause finds it done and has joined it.
            if entry.phase == "running":
                if healthy:
                    if entry.record.frozen:
                        await self._reach(entry)
                    await self._lifecycle.check_health(entry)
                await self._pause_locked(entry, memory=memory, for_good=for_good)

    async def _pause_locked(self, entry: Entry, *, memory: bool, for_good: bool = False) -> None:
        try:
            await self._lifecycle.pause(entry, memory=memory, for_good=for_good)
            if entry.phase == "running":
                words = "a pause was given up, as it was wanted again"
            else:
                words = "paused" if memory else "paused without its memory"
            self._journal.note(entry.record.id, words)
        except EngineError as error:
            self._journal.note(entry.record.id, error.message, level="error")
            raise
        finally:
            if entry.phase == "gone":
                self._forget(entry, "it ended while it was being paused")

    async def reboot(self, entry: Entry, seconds: int) -> Entry:
        async with entry.lock:
            self._sandboxes.check_there(entry)
            if entry.phase == "paused":
                await self._resume(entry, seconds, memory=False)
            else:
                await self._lifecycle.restart(entry)
                self._journal.note(entry.record.id, "rebooted")
                await self._reach(entry)
                await self._extend(entry, seconds)
            return entry

    async def kill(self, entry: Entry) -> None:
        async with entry.claimed():
            self._sandboxes.check_there(entry)
            await self.end(entry, "it was killed")

    async def expire(self, entry: Entry, retry_at: datetime) -> None:
        async with entry.lock:
            # Somebody may have extended it while this waited for the lock.
            if entry.phase != "running" or entry.record.end_at != retry_at:
                return

            if not entry.record.auto_pause:
                await self.end(entry, "its timeout was reached")
                return

            try:
                await self._pause_locked(entry, memory=entry.record.auto_pause_memory)
            except EngineError as error:
                log.error("%s", error)

    async def end_kept(self, entry: Entry) -> None:
        async with entry.lock:
            # Somebody may have resumed it while this waited for the lock.
            if self._retention.over(entry):
                await self._end_kept(entry)

    async def _end_kept(self, entry: Entry) -> None:
        await self.end(entry, f"it was paused for longer than the {self._retention.days:g} days for which it is kept")

    async def lost(self, entry: Entry, container: Container) -> None:
        async with entry.lock:
            if entry.phase != "running" or self._lifecycle.container(entry) != container:
                return

            reason = _by_itself(entry)
            log.error("Sandbox %s is lost: %s", entry.record.id, reason)
            await self.end(entry, reason)

    async def end(self, entry: Entry, reason: str) -> None:
        # Remembered first: from here on whoever asks is told that it is gone, and why.
        self._sandboxes.remember(entry, reason)
        await self._lifecycle.end(entry, reason)
        self._forget(entry, reason)

    async def _change(self, entry: Entry, changes: Mapping[str, Any]) -> None:
        before = entry.record
        entry.record = before.model_copy(update=dict(changes))
        try:
            await self._lifecycle.save(entry)
        except EngineError:
            entry.record = before
            raise
        self._on_deadline_moved()

    def check_awake(self, entry: Entry) -> None:
        """Whether traffic may come in, be it that the sandbox has to be resumed.

        Raises:
            NotFoundError: It sleeps, and traffic does not wake it.
        """
        if entry.phase == "paused" and not entry.record.wakes:
            msg = f"Sandbox {entry.record.id} is paused and traffic does not wake it. Connect to it to resume it."
            raise NotFoundError(msg, op="connect", sandbox_id=entry.record.id)

    def _forget(self, entry: Entry, reason: str) -> None:
        self._sandboxes.remember(entry, reason)
        self._sandboxes.forget(entry)
        self._metering.forget(entry.record.id)


def _woken_for(entry: Entry) -> int:
    """Seconds that traffic which wakes a sandbox gives it."""
    return min(max(entry.record.timeout, TRAFFIC_SECONDS), MAX_TIMEOUT)


def _by_itself(entry: Entry) -> str:
    return f"it ended by itself; most likely it needed more than its {entry.record.memory_mb} MB of memory"
