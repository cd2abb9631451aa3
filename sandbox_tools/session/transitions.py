"""Makes, wakes, pauses and ends one sandbox because somebody asked to, each under the guard of its binding."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sandbox_tools import telemetry
from sandbox_tools.client.sentinel import Sentinel
from sandbox_tools.errors import (
    OwnershipError,
    SandboxBusyError,
    SandboxExpiredError,
    StateLostError,
)
from sandbox_tools.session.rest import AWAKE, GONE, PATIENCE, Rest
from sandbox_tools.session.rows import Binding, Unless
from sandbox_tools.session.stamps import HANDLE, THREAD, stamp

if TYPE_CHECKING:
    from sandbox_tools.client import Sandbox

log = logging.getLogger("sandbox_tools.session")

FRESH = 5.0
"""Seconds for which a sandbox seen running is taken to run still, without asking."""

SEEN = 0.05
"""Seconds from which on somebody who waits for a sandbox that was there before is said to have waited."""


class Transitions(Rest):
    """What all sessions of one registry share of that; within it, one transition of a handle waits for another."""

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
            await self.forget(held, "killed")
            return any(killed)

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
            if held.state == "paused":
                # If this process dies before it can say that it runs, others look after it.
                await self.bindings.note(held, state="unknown", awake_until=now + AWAKE)
            with contextlib.nullcontext() if ran else telemetry.span("sandbox.resume", held.ids):
                sandbox = await self.client.connect(held.sandbox_id, timeout=AWAKE)
        except GONE:
            async with self._transition(held.handle, unless="nothing") as gone:
                if gone is not None and gone.sandbox_id == held.sandbox_id:
                    await self.forget(gone, "lost")
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
            lost = " and ".join(sorted(error.lost))
            log.warning("the sandbox %s woke without its %s", held.handle, lost, extra=held.ids)
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
                with telemetry.span("sandbox.create", held.ids):
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
