"""Moves one sandbox between its states: makes, wakes, freezes, pauses, ends it, each under the guard of its binding."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

from sandbox_tools.client.sentinel import Sentinel
from sandbox_tools.errors import (
    ConflictError,
    NotFoundError,
    OwnershipError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    StateLostError,
)
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.evidence import Evidence
from sandbox_tools.session.rows import Binding, Hint, Unless
from sandbox_tools.session.stamps import HANDLE, THREAD, Stamps, stamp

if TYPE_CHECKING:
    from sandbox_tools.client import Client, Sandbox

log = logging.getLogger("sandbox_tools.session")

AWAKE = 300
"""Seconds the server is asked to keep a sandbox awake; renewed while a lease is held or a turn is open."""

FRESH = 5.0
"""Seconds for which a sandbox seen running is taken to run still, without asking."""

SEEN = 0.05
"""Seconds from which on somebody who waits for a sandbox that was there before is said to have waited."""

PATIENCE = 900.0
"""Seconds a lease waits for another process's transition; a first create may build the local template in it."""

GONE = (NotFoundError, SandboxExpiredError)


@dataclass(slots=True, kw_only=True)
class Awake:
    """A sandbox this process has seen running.

    Attributes:
        planted: The beginning of the idle period in which its mark was left; 0: before all of them.
    """

    sandbox: Sandbox
    seen_at: float
    planted: float = 0.0


class Transitions:
    """What all sessions of one registry share of that; within it, one transition of a handle waits for another.

    None of this may be cut short: `Sessions` runs each call as its own task and lets only the waiting be cancelled.
    """

    def __init__(
        self,
        client: Client,
        bindings: Bindings,
        evidence: Evidence,
        clock: Clock,
        *,
        holder: str,
        expiry: float,
        template: str | None,
    ) -> None:
        self.client = client
        self.bindings = bindings
        self.evidence = evidence
        self.clock = clock
        self.holder = holder
        self.expiry = expiry
        self.template = template
        self.awake: dict[str, Awake] = {}
        self.stamps = Stamps(client, bindings, clock)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def distrust(self, handle: str | None) -> None:
        """Have the next lease ask the server, whatever was known of the sandbox."""
        if awake := self.awake.get(handle or ""):
            awake.seen_at = 0

    async def open(
        self, owner: str, thread: str, *, use: str, handle: str | None = None, sensitive: bool = False
    ) -> tuple[str, Sandbox]:
        """Begin the lease `use` on the thread's sandbox, made or woken as needed; the caller ends it, even on an error.

        Args:
            handle: A sandbox of the owner to wake instead, which is then never made anew.
            sensitive: What a sandbox that is made here will be.

        Raises:
            OwnershipError: The owner has no such handle, or the sandbox behind it bears another owner's stamp.
            SandboxExpiredError: The sandbox of `handle` is gone.
            SandboxBusyError: Another process's transition took longer than `PATIENCE` seconds.
        """
        give_up, pause, began = time.monotonic() + PATIENCE, 0.02, self.clock.time()
        while time.monotonic() < give_up:
            found = await (self._current(owner, thread, sensitive) if handle is None else self.owned(owner, handle))
            async with self._lock(found.handle):
                held = await self._begin_lease(owner, thread, found.handle, use)
                if held is not None:
                    sandbox = await (self._wake(held) if held.sandbox_id else self._create(held))
                    if sandbox is not None:
                        if held.sandbox_id and (waited := self.clock.time() - began) > SEEN:
                            await self.evidence.changed(held, "running", waited=waited)
                        return found.handle, sandbox
                    if handle is not None and await self.bindings.by_handle(owner, handle) is None:
                        msg = f"The sandbox {handle!r} is gone, and its state with it. Use another one."
                        raise SandboxExpiredError(msg, op="resume")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.5)
        msg = "Another process has been creating or pausing this sandbox for too long. Try again in a moment."
        raise SandboxBusyError(msg, op="lease")

    async def wake_early(self, owner: str, thread: str, *, use: str, still: Callable[[], bool]) -> str | None:
        """Wake what the thread has, under the lease `use`, ahead of whoever will need it; the caller ends the lease.

        A pause that is under way is waited for. Nothing is made anew, and nothing is begun once `still` says no.

        Returns:
            The handle that runs now. None: there is none.
        """
        pause = 0.02
        while still():
            found = await self.bindings.find(owner, thread)
            if found is None or found.sandbox_id is None:
                return None
            async with self._lock(found.handle):
                if still() and (held := await self._begin_lease(owner, thread, found.handle, use, ahead=True)):
                    return held.handle if held.sandbox_id and await self._wake(held) else None
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.5)
        return None

    async def owned(self, owner: str, handle: str) -> Binding:
        """The owner's binding of that handle; the error is the same for an unknown handle and a foreign one."""
        found = await self.bindings.by_handle(owner, handle)
        if found is None and await self.stamps.recover(owner, {HANDLE: handle}):
            found = await self.bindings.by_handle(owner, handle)
        if found is None:
            msg = f"There is no sandbox {handle!r} here. List the paused sandboxes for the handles there are."
            raise OwnershipError(msg)
        return found

    async def pause(self, handle: str) -> bool:
        """Pause because somebody asked to, open turns or not. False: there was nothing to pause.

        Raises:
            SandboxBusyError: A lease is held, here or in another process.
        """
        async with self.exclusive(handle, unless="leased") as held:
            if held is None:
                msg = f"The sandbox {handle!r} is in use. Pause it when nothing runs in it."
                raise SandboxBusyError(msg, op="pause")
            return await self.put_to_sleep(held)

    async def kill(self, handle: str, *, unless: Unless = "nothing") -> bool:
        """End the sandbox and forget its binding, whoever uses it. True: there was one.

        Raises:
            SandboxBusyError: It is in another process's transition, or in use as `unless` forbids.
        """
        async with self.exclusive(handle, unless=unless) as held:
            if held is None:
                msg = f"The sandbox {handle!r} is being created or paused. Try again in a moment."
                raise SandboxBusyError(msg, op="kill")
            # By the stamp, so that a sandbox whose create went unanswered ends as well.
            doomed = set() if held.state == "new" else {info.sandbox_id for info in await self.stamps.find(held)}
            if held.sandbox_id is not None:
                doomed.add(held.sandbox_id)
            killed = [await self.client.kill(sandbox_id) for sandbox_id in doomed]
            await self._forget(held, "killed")
            return any(killed)

    @contextlib.asynccontextmanager
    async def exclusive(self, handle: str, *, unless: Unless) -> AsyncIterator[Binding | None]:
        """The exclusive right to change it, before others here and in other processes; None where it cannot be had."""
        async with self._lock(handle), self._transition(handle, unless=unless) as held:
            yield held

    async def put_to_sleep(self, held: Binding) -> bool:
        """Pause it in a transition; a sensitive one keeps its files only, or ends where the provider cannot do that."""
        if held.sandbox_id is None:
            return False
        keeps = "nothing" if held.sensitive and not self.keeps_files else "files" if held.sensitive else "memory"
        await self.plant(held)
        began = self.clock.time()
        try:
            if keeps == "nothing":
                await self.client.kill(held.sandbox_id)
            else:
                paused = await self.client.pause(held.sandbox_id, memory=keeps == "memory")
        except GONE:
            await self._forget(held, "lost")
            return False
        if keeps == "nothing":
            await self._forget(held, "lost")
            return True
        if keeps == "files":
            await self.bindings.note_lost(held.handle, "memory")
        elif paused:
            self.evidence.pause_took(self.clock.time() - began)
        self.awake.pop(held.handle, None)
        if await self.bindings.end_transition(held, state="paused", sandbox_id=held.sandbox_id):
            await self.evidence.changed(held, "paused")
        return True

    async def freeze(self, held: Binding) -> bool:
        """Stop its tasks in a transition, memory held. False: something in it is under way; ask again."""
        assert held.sandbox_id is not None
        try:
            frozen = await self.client.freeze(held.sandbox_id)
        except (ConflictError, *GONE) as error:
            # That it is gone is for the next lease, or the pause that is due later, to find out.
            log.info("could not freeze %s: %s", held.handle, error)
            return False
        if frozen:
            await self.evidence.changed(held, "frozen")
        return frozen

    async def plant(self, held: Binding) -> None:
        """Leave the mark that the next resume looks for, once in an idle period, for whoever pauses it at its end."""
        awake = self.awake.get(held.handle)
        if awake is None or awake.planted == held.idle_since:
            return
        mark = await awake.sandbox.plant(memory=not held.sensitive)
        if mark is not None:
            await self.bindings.mark(held, mark.model_dump_json())
        awake.planted = held.idle_since

    async def arm(self, held: Binding, seconds: int, *, due_at: float, frozen: bool = False) -> None:
        """Set the server's own timer, so that the pause comes even if this process does not live to ask for it."""
        assert held.sandbox_id is not None
        state: Hint = "frozen" if frozen else "running"
        try:
            seconds = await self.set_timeout(held.sandbox_id, seconds)
        except SandboxError as error:
            # Not even a 404 means lost: a paused sandbox answers it too. The next lease finds out.
            log.warning("could not set the timeout of %s: %s", held.handle, error)
            state = "unknown"
        await self.bindings.end_transition(
            held,
            state=state,
            sandbox_id=held.sandbox_id,
            awake_until=self.clock.time() + seconds,
            due_at=due_at,
        )

    @property
    def keeps_files(self) -> bool:
        """Whether the provider can pause without memory."""
        return "pause(memory=False)" not in self.client.dialect.lacks

    async def leave(self, held: Binding, *, due_at: float = math.inf) -> None:
        """Leave it to the server's own timer as that is.

        Args:
            due_at: When it is looked at again; inf: not before its next use.
        """
        await self.bindings.end_transition(
            held, state=held.state, sandbox_id=held.sandbox_id, awake_until=held.awake_until, due_at=due_at
        )

    async def set_timeout(self, sandbox_id: str, seconds: int) -> int:
        """Move the server's own timer; the seconds it is at then, which the provider may limit."""
        seconds = min(seconds, self.client.dialect.max_timeout or seconds)
        await self.client.set_timeout(sandbox_id, seconds)
        return seconds

    def _lock(self, handle: str) -> asyncio.Lock:
        """The handle's own; it lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(handle, asyncio.Lock())

    async def _current(self, owner: str, thread: str, sensitive: bool) -> Binding:
        found = await self.bindings.find(owner, thread)
        if found is None:
            await self.stamps.recover(owner, {THREAD: thread})
            found = await self.bindings.current(owner, thread, self.clock.time(), sensitive=sensitive)
        return found

    async def _begin_lease(self, owner: str, thread: str, handle: str, use: str, ahead: bool = False) -> Binding | None:
        now = self.clock.time()
        return await self.bindings.begin_lease(
            owner, thread, handle, use=use, holder=self.holder, now=now, until=now + self.expiry, ahead=ahead
        )

    async def _wake(self, held: Binding) -> Sandbox | None:
        """Make sure it runs; on a running one, connect only prolongs. None: it is gone, look again."""
        now = self.clock.time()
        awake = self.awake.get(held.handle)
        ran = held.state in ("running", "frozen") and held.awake_until > now
        fresh = awake is not None and held.state == "running" and now - awake.seen_at < FRESH
        if awake and fresh and held.awake_until - now > AWAKE / 2:
            return awake.sandbox
        assert held.sandbox_id is not None
        try:
            await self.stamps.check(held)
            sandbox = await self.client.connect(held.sandbox_id, timeout=AWAKE)
        except GONE:
            async with self._transition(held.handle, unless="nothing") as gone:
                if gone is not None and gone.sandbox_id == held.sandbox_id:
                    await self._forget(gone, "lost")
            return None
        if held.state == "paused":
            self.evidence.resume_took(self.clock.time() - now)
        if not ran:
            await self._verify(held, sandbox)
        self.saw(held.handle, sandbox)
        await self.bindings.note(held, state="running", awake_until=self.clock.time() + AWAKE)
        if held.state != "running":
            await self.evidence.changed(held, "running")
        return sandbox

    async def _verify(self, held: Binding, sandbox: Sandbox) -> None:
        """Look for what was planted before the pause; what is missing is told to the threads that use it, once."""
        if held.sentinel is None:
            return
        try:
            await sandbox.verify(Sentinel.model_validate_json(held.sentinel))
        except StateLostError as error:
            log.warning("the sandbox %s woke without its %s", held.handle, " and ".join(sorted(error.lost)))
            await self.bindings.note_lost(held.handle, *error.lost)

    async def _create(self, leased: Binding) -> Sandbox | None:
        """Make the sandbox, or find the one that an earlier, unanswered create made. None: look again."""
        async with self._transition(leased.handle, unless="nothing") as held:
            if held is None or held.sandbox_id is not None:
                return None
            made = await self.stamps.find(held) if held.state == "creating" else []
            if made:
                first, *rest = made
                for stray in rest:
                    await self.client.kill(stray.sandbox_id)
                sandbox = await self.client.connect(first.sandbox_id, timeout=AWAKE)
            elif await self.bindings.write(held, state="creating", sandbox_id=None):
                sandbox = await self.client.create(
                    self.template,
                    timeout=AWAKE,
                    # A sensitive one ends at the timeout where the provider cannot pause without its memory.
                    auto_pause=self.keeps_files or not held.sensitive,
                    pause_memory=not (held.sensitive and self.keeps_files),
                    metadata=stamp(held),
                )
            else:
                return None
            until = self.clock.time() + AWAKE
            if not await self.bindings.end_transition(held, state="running", sandbox_id=sandbox.id, awake_until=until):
                # This process slept past its hold. Whoever held next has adopted this sandbox by its stamp, or, having
                # looked too early, made another; this one then falls asleep by its timer, and `kill` finds it.
                return None
            self.saw(held.handle, sandbox)
            await self.evidence.changed(held, "running")
            return sandbox

    async def _forget(self, held: Binding, why: Literal["killed", "lost"]) -> None:
        self.awake.pop(held.handle, None)
        self.stamps.forget(held.sandbox_id)
        if await self.bindings.forget(held, lost=why == "lost"):
            await self.evidence.changed(held, why)
            if why == "lost":
                log.warning("the sandbox %s is gone, and its state with it", held.handle)

    def saw(self, handle: str, sandbox: Sandbox) -> None:
        """It runs now."""
        self.awake[handle] = Awake(sandbox=sandbox, seen_at=self.clock.time())

    @contextlib.asynccontextmanager
    async def _transition(self, handle: str, *, unless: Unless) -> AsyncIterator[Binding | None]:
        """Hold the exclusive right, if it is to be had; what the body has not ended by then ends with nothing known."""
        now = self.clock.time()
        held = await self.bindings.begin_transition(
            handle, holder=self.holder, now=now, until=now + self.expiry, unless=unless
        )
        try:
            yield held
        finally:
            if held is not None:
                await self.bindings.abandon(held)
