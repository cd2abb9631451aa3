"""Moves one sandbox between its states: makes, wakes, pauses and ends it, each under the guard of its binding."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from sandbox_tools.errors import (
    NotFoundError,
    OwnershipError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
)
from sandbox_tools.models import SandboxInfo
from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.pause import Idle, PausePolicy
from sandbox_tools.session.bindings import Binding, Hint, SqliteBindings, Unless
from sandbox_tools.session.clock import Clock

if TYPE_CHECKING:
    from sandbox_tools.client import Client, Sandbox

log = logging.getLogger("sandbox_tools.session")

OWNER, THREAD, HANDLE = "sandbox_tools.owner", "sandbox_tools.thread", "sandbox_tools.handle"
"""The stamp in a sandbox's metadata. The handle is also the key under which a lost create is found again."""

AWAKE = 300
"""Seconds the server is asked to keep a sandbox awake; renewed while a lease is held."""

FRESH = 5.0
"""Seconds for which a sandbox seen running is taken to run still, without asking."""

GRACE = 15
"""Seconds by which the server's own timer follows the policy's pause, so that it acts only if we do not."""

HOLD = 60.0
"""Seconds after which a use or transition that is not renewed counts as its process's death."""

PATIENCE = 900.0
"""Seconds a lease waits for another process's transition; a first create may build the local template in it."""

GONE = (NotFoundError, SandboxExpiredError)


@dataclass(slots=True, kw_only=True)
class Awake:
    """A sandbox this process has seen running."""

    sandbox: Sandbox
    seen_at: float
    until: float


class Transitions:
    """What all sessions of one registry share of that; within it, one transition of a handle waits for another.

    None of this may be cut short: `Sessions` runs each call as its own task and lets only the waiting be cancelled.
    """

    def __init__(
        self,
        client: Client,
        bindings: SqliteBindings,
        policy: PausePolicy,
        clock: Clock,
        *,
        holder: str,
        template: str | None,
    ) -> None:
        self.client = client
        self.bindings = bindings
        self.policy = policy
        self.clock = clock
        self.holder = holder
        self.template = template
        self.awake: dict[str, Awake] = {}
        self._checked: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock(self, handle: str) -> asyncio.Lock:
        """The handle's own lock; it lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(handle, asyncio.Lock())

    def distrust(self, handle: str | None) -> None:
        """Have the next lease ask the server, whatever was known of the sandbox."""
        if awake := self.awake.get(handle or ""):
            awake.seen_at = 0

    async def open(self, owner: str, thread: str, *, use: str, handle: str | None = None) -> tuple[str, Sandbox]:
        """Begin the lease `use` on the thread's sandbox, made or woken as needed; the caller ends it, even on an error.

        Args:
            handle: A sandbox of the owner to wake instead, which is then never made anew.

        Raises:
            OwnershipError: The owner has no such handle, or the sandbox behind it bears another owner's stamp.
            SandboxExpiredError: The sandbox of `handle` is gone.
            SandboxBusyError: Another process's transition took longer than `PATIENCE` seconds.
        """
        give_up, pause = time.monotonic() + PATIENCE, 0.02
        while time.monotonic() < give_up:
            if handle is not None:
                await self.owned(owner, handle)
            wanted = handle or (await self.bindings.current(owner, thread, self.clock.time())).handle
            async with self.lock(wanted):
                now = self.clock.time()
                held = await self.bindings.begin_lease(
                    owner, thread, wanted, use=use, holder=self.holder, now=now, until=now + HOLD
                )
                if held is not None:
                    sandbox = await (self._wake(held) if held.sandbox_id else self._create(held))
                    if sandbox is not None:
                        return wanted, sandbox
                    if handle is not None and await self.bindings.by_handle(owner, handle) is None:
                        msg = f"The sandbox {handle!r} is gone, and its state with it. Use another one."
                        raise SandboxExpiredError(msg, op="resume")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.5)
        msg = "Another process has been creating or pausing this sandbox for too long. Try again in a moment."
        raise SandboxBusyError(msg, op="lease")

    async def owned(self, owner: str, handle: str) -> Binding:
        """The owner's binding of that handle; the error is the same for an unknown handle and a foreign one."""
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
        async with self.lock(handle), self._transition(handle, unless="leased") as held:
            if held is None:
                msg = f"The sandbox {handle!r} is in use. Pause it when nothing runs in it."
                raise SandboxBusyError(msg, op="pause")
            return await self._pause(held)

    async def settle(self, handle: str, *, closing: bool = False) -> float | None:
        """Do what the policy says with a sandbox that may be idle.

        Args:
            closing: The registry is about to close: what would be paused later is paused now.

        Returns:
            When to ask again, in seconds since the epoch. None: when it has been used again.
        """
        async with self.lock(handle), self._transition(handle, unless="used") as held:
            if held is None or held.sandbox_id is None or held.state == "paused":
                return None
            now = self.clock.time()
            terms = Terms.of(vcpu=2, gib=2)
            plan = self.policy.plan(Idle(owner=held.owner, began=held.idle_since, terms=terms))
            if plan.pause_after is None:
                return None
            left = held.idle_since + plan.pause_after - now
            if closing or left <= 0:
                log.info("pausing %s: %s", handle, plan.reason)
                await self._pause(held)
                return None
            await self._arm(held, math.ceil(left) + GRACE)
            return now + left

    async def kill(self, handle: str) -> bool:
        """End the sandbox and forget its binding, whoever uses it. True: there was one.

        Raises:
            SandboxBusyError: It is in another process's transition.
        """
        async with self.lock(handle), self._transition(handle, unless="nothing") as held:
            if held is None:
                msg = f"The sandbox {handle!r} is being created or paused. Try again in a moment."
                raise SandboxBusyError(msg, op="kill")
            # By the stamp, so that a sandbox whose create went unanswered ends as well.
            doomed = set() if held.state == "new" else {info.sandbox_id for info in await self._stamped(held)}
            if held.sandbox_id is not None:
                doomed.add(held.sandbox_id)
            killed = [await self.client.kill(sandbox_id) for sandbox_id in doomed]
            await self._forget(held, lost=False)
            return any(killed)

    async def beat(self, leased: set[str]) -> None:
        """Renew what this registry holds: its uses, its transitions, and the server's timers under its leases."""
        now = self.clock.time()
        await self.bindings.renew(self.holder, now=now, until=now + HOLD)
        for handle in leased:
            awake = self.awake.get(handle)
            if awake is None or awake.until - now > AWAKE / 2:
                continue
            try:
                await self.client.set_timeout(awake.sandbox.id, AWAKE)
            except SandboxError as error:
                log.warning("could not prolong %s, which is in use: %s", handle, error)
            else:
                awake.until = now + AWAKE

    async def _wake(self, held: Binding) -> Sandbox | None:
        """Make sure it runs; on a running one, connect only prolongs. None: it is gone, look again."""
        now = self.clock.time()
        awake = self.awake.get(held.handle)
        if awake and held.state == "running" and now - awake.seen_at < FRESH and held.awake_until - now > AWAKE / 2:
            return awake.sandbox
        assert held.sandbox_id is not None
        try:
            if held.sandbox_id not in self._checked:
                # Before connecting, because that wakes a sandbox and re-arms its timer, whosever it is.
                await self._check_owner(held)
                self._checked.add(held.sandbox_id)
            sandbox = await self.client.connect(held.sandbox_id, timeout=AWAKE)
        except GONE:
            async with self._transition(held.handle, unless="nothing") as gone:
                if gone is not None and gone.sandbox_id == held.sandbox_id:
                    await self._forget(gone, lost=True)
            return None
        self._saw(held.handle, sandbox)
        await self.bindings.note(held, state="running", awake_until=now + AWAKE)
        return sandbox

    async def _check_owner(self, held: Binding) -> None:
        assert held.sandbox_id is not None
        info = await self.client.info(held.sandbox_id)
        if info.metadata.get(OWNER) != held.owner:
            msg = f"The sandbox {held.handle!r} does not bear this owner's stamp. Kill the session to start anew."
            raise OwnershipError(msg)

    async def _create(self, leased: Binding) -> Sandbox | None:
        """Make the sandbox, or find the one that an earlier, unanswered create made. None: look again."""
        async with self._transition(leased.handle, unless="nothing") as held:
            if held is None or held.sandbox_id is not None:
                return None
            made = await self._stamped(held) if held.state == "creating" else []
            if made:
                first, *rest = sorted(made, key=lambda info: info.started_at)
                for stray in rest:
                    await self.client.kill(stray.sandbox_id)
                sandbox = await self.client.connect(first.sandbox_id, timeout=AWAKE)
            elif await self.bindings.write(held, state="creating", sandbox_id=None):
                stamp = {OWNER: held.owner, THREAD: held.thread, HANDLE: held.handle}
                sandbox = await self.client.create(self.template, timeout=AWAKE, auto_pause=True, metadata=stamp)
            else:
                return None
            until = self.clock.time() + AWAKE
            if not await self.bindings.end_transition(held, state="running", sandbox_id=sandbox.id, awake_until=until):
                # This process slept past its hold. Whoever held next has adopted this sandbox by its stamp, or, having
                # looked too early, made another; this one then falls asleep by its timer, and `kill` finds it.
                return None
            self._saw(held.handle, sandbox)
            return sandbox

    async def _stamped(self, held: Binding) -> list[SandboxInfo]:
        stamp = {OWNER: held.owner, HANDLE: held.handle}
        return [info async for info in self.client.list(metadata=stamp)]

    async def _pause(self, held: Binding) -> bool:
        if held.sandbox_id is None:
            return False
        try:
            await self.client.pause(held.sandbox_id)
        except GONE:
            await self._forget(held, lost=True)
            return False
        self.awake.pop(held.handle, None)
        await self.bindings.end_transition(held, state="paused", sandbox_id=held.sandbox_id)
        return True

    async def _arm(self, held: Binding, timeout: int) -> None:
        """Shorten the server's own timer, so that the pause comes even if this process does not live to ask for it."""
        assert held.sandbox_id is not None
        state: Hint = "running"
        try:
            await self.client.set_timeout(held.sandbox_id, timeout)
        except SandboxError as error:
            # Not even a 404 means lost: a paused sandbox answers it too. The next lease finds out.
            log.warning("could not set the timeout of %s: %s", held.handle, error)
            state = "unknown"
        await self.bindings.end_transition(
            held, state=state, sandbox_id=held.sandbox_id, awake_until=self.clock.time() + timeout
        )

    async def _forget(self, held: Binding, *, lost: bool) -> None:
        self.awake.pop(held.handle, None)
        self._checked.discard(held.sandbox_id or "")
        if await self.bindings.forget(held, lost=lost) and lost:
            log.warning("the sandbox %s is gone, and its state with it", held.handle)

    def _saw(self, handle: str, sandbox: Sandbox) -> None:
        now = self.clock.time()
        self.awake[handle] = Awake(sandbox=sandbox, seen_at=now, until=now + AWAKE)

    @contextlib.asynccontextmanager
    async def _transition(self, handle: str, *, unless: Unless) -> AsyncIterator[Binding | None]:
        """Hold the exclusive right, if it is to be had; what the body has not ended by then ends with nothing known."""
        now = self.clock.time()
        held = await self.bindings.begin_transition(
            handle, holder=self.holder, now=now, until=now + HOLD, unless=unless
        )
        try:
            yield held
        finally:
            if held is not None:
                await self.bindings.abandon(held)
