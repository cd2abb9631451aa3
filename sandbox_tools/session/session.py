"""One conversation: lends out its sandbox, knows its turns, and does what its model asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from sandbox_tools import telemetry
from sandbox_tools.errors import ConfigError, ExecutionTimeoutError, SandboxError
from sandbox_tools.session.retention import PausedSandbox
from sandbox_tools.session.turns import Lease

if TYPE_CHECKING:
    from sandbox_tools.client import Sandbox
    from sandbox_tools.session.sessions import Sessions

log = logging.getLogger("sandbox_tools.session")

T = TypeVar("T")

COMMAND_LIMIT = 86_400.0
"""Seconds for which a command in the background may keep its sandbox awake."""


class Session:
    """One conversation of one owner; made by `Sessions.session`, cheap, and not bound to one sandbox for life."""

    def __init__(self, sessions: Sessions, thread: str, owner: str, *, sensitive: bool = False) -> None:
        self.thread = thread
        self.owner = owner
        self.sensitive = sensitive
        self._key = (owner, thread)
        self._ids = {"owner_id": owner, "thread_id": thread}
        self._sessions = sessions
        self._transitions = sessions.transitions
        self._bindings = sessions.bindings
        self._turns = sessions.turns

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Sandbox]:
        """The thread's sandbox, created or woken if need be; nothing pauses it inside the `async with`.

        A command that is started in it and runs on keeps the sandbox awake until it has ended.

        Raises:
            SandboxBusyError: Another process has been creating or pausing it for a quarter of an hour.
            OwnershipError: The sandbox does not bear this owner's stamp.
        """
        self._sessions.on_own_loop()
        use = secrets.token_hex(8)
        opening = self._sessions.spawn(self._open(use))
        try:
            sandbox = await asyncio.shield(opening)
            handle = self._turns.leases[use].handle
            telemetry.identify({**self._ids, "sandbox_id": sandbox.id, "sandbox_handle": handle})
            yield sandbox
        except SandboxError as error:
            lease = self._turns.leases.get(use)
            if lease is not None and not isinstance(error, ExecutionTimeoutError):
                self._transitions.distrust(lease.handle)
            raise
        finally:
            ending = self._sessions.spawn(self._end_lease(use, opening))
            # Cancelled while it opens: the opening goes on and its lease ends behind the caller's back.
            if opening.done():
                await asyncio.shield(ending)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Session]:
        """One turn of the conversation: it ends at exit, however that comes about. Turns may nest and overlap.

        With `PauseAfter(0)` the sandbox is paused when the exit returns.
        """
        run = secrets.token_hex(8)
        try:
            await self.turn_started(run)
            yield self
        finally:
            await self.turn_ended(run)

    async def turn_started(self, run: str = "turn") -> None:
        """Note that the turn `run` is open, and wake its sandbox ahead of the first tool call, without waiting for it.

        Again for the same run changes nothing. A wake that fails is the first tool call's to report.
        """
        self._sessions.on_own_loop()
        self.note_turn(run)
        await self._finish(self.begin_turns())

    async def turn_ended(self, run: str = "turn") -> None:
        """Note that it has ended, and do what the policy says at once; later what it says for later.

        A pause that fails is logged and tried again, not raised: the turn has its outcome.
        """
        if self.drop_turn(run):
            await self._finish(self.end_turn(run))

    def note_turn(self, run: str) -> None:
        """The part of `turn_started` that needs no event loop; the next lease does the rest, if nobody does before."""
        self._turns.note(self._key, self._turn_use(run), self._sessions.clock.time())

    def drop_turn(self, run: str) -> bool:
        """The part of `turn_ended` that needs no event loop. False: there is no such turn."""
        dropped = self._turns.drop(self._key, self._turn_use(run))
        if dropped is not None:
            self._sessions.evidence.turn_was(self.owner, used=dropped.used)
        return dropped is not None

    async def begin_turns(self) -> None:
        """Let other processes know of the turns noted here, and begin to wake what the thread has."""
        begun = await self._write_turns()
        if begun and self._sessions.evidence.expects_use(self.owner):
            self._sessions.spawn(self._wake_early())

    async def wake(self) -> None:
        """Begin to wake what the thread has, without waiting: its model has begun to call a tool.

        Where turns are expected to use their sandbox, their start has done so already.
        """
        if self._sessions.evidence.early_resume and not self._sessions.evidence.expects_use(self.owner):
            self._sessions.spawn(self._wake_early())

    async def end_turn(self, run: str) -> None:
        """The rest of `turn_ended`, on the loop of the registry."""
        await self._sessions.end_use(self._turn_use(run))

    async def hold(self, seconds: float) -> None:
        """Keep the thread's sandbox from being paused for that long, beyond turn and process; replaces an earlier hold.

        Args:
            seconds: 0: not any longer.

        Raises:
            ConfigError: `seconds` is negative or not finite, or the thread has no sandbox yet.
        """
        await self._hold("hold", seconds)

    async def expose(self, port: int, seconds: float = 3600.0) -> None:
        """Keep it awake while others use a port of it; `Sandbox.url(port)` is its address. As `hold`, for each port."""
        await self._hold(f"port {port}", seconds)

    async def new(self) -> str:
        """Leave the thread's sandbox to sleep, as one of several, and let the next lease make a new one.

        Returns:
            The handle of the new one. `resume` goes back to an earlier one, which `list_paused` tells.
        """
        self._sessions.on_own_loop()
        return await self._finish(self._new())

    async def pause(self, handle: str | None = None) -> str | None:
        """Pause a sandbox of the owner, in the middle of a turn if need be.

        Args:
            handle: Which one. None: the thread's own.

        Returns:
            Its handle. None: the thread has no sandbox.

        Raises:
            SandboxBusyError: A lease is held.
            OwnershipError: The owner has no such handle.
        """
        self._sessions.on_own_loop()
        return await self._finish(self._pause(handle))

    async def resume(self, handle: str | None = None) -> str | None:
        """Wake a sandbox of the owner and make it the thread's own; the one it had before stays what it is.

        Args:
            handle: Which one, of this conversation or an earlier one. None: the thread's own.

        Returns:
            Its handle. None: the thread has no sandbox.

        Raises:
            SandboxExpiredError: It is gone.
            OwnershipError: The owner has no such handle.
        """
        self._sessions.on_own_loop()
        return await self._finish(self._resume(handle))

    async def list_paused(self) -> list[PausedSandbox]:
        """The owner's paused sandboxes, the last paused first."""
        own = await self._bindings.find(self.owner, self.thread)
        return await self._sessions.keeper.paused(self.owner, current=own.handle if own else None)

    async def kill(self) -> bool:
        """End the thread's sandbox, its state with it, and forget it. True: there was one.

        Raises:
            SandboxBusyError: Another process is creating or pausing it.
        """
        self._sessions.on_own_loop()
        binding = await self._bindings.find(self.owner, self.thread)
        return binding is not None and await self._finish(self._transitions.kill(binding.handle))

    async def take_lost(self) -> frozenset[str]:
        """What the thread has lost since it was last asked; each loss is told once.

        Returns:
            `"sandbox"`: it was found gone, and the next one starts empty. `"memory"`, `"files"`: these are not what
            was paused. Empty: nothing.
        """
        return await self._bindings.take_lost(self.owner, self.thread)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Its outcome; cancelling the caller does not cancel the work."""
        return await asyncio.shield(self._sessions.spawn(work))

    def _turn_use(self, run: str) -> str:
        return f"{self._sessions.holder}/{self.owner}/{self.thread}/{run}"

    async def _write_turns(self) -> list[str]:
        unwritten = self._turns.unwritten(self._key)
        try:
            for use in unwritten:
                now = self._sessions.clock.time()
                until = now + self._sessions.expiry
                await self._bindings.begin_turn(*self._key, use=use, holder=self._sessions.holder, now=now, until=until)
        except BaseException:
            self._turns.put_back(self._key, unwritten)
            raise
        return unwritten

    async def _wake_early(self) -> None:
        use = secrets.token_hex(8)
        try:
            await self._transitions.wake_early(
                self.owner,
                self.thread,
                use=use,
                still=lambda: self._turns.has(self._key),
            )
        except SandboxError as error:
            said = "could not wake the sandbox of %r ahead of its turn; the first tool call tries: %s"
            log.info(said, self.thread, error, extra=self._ids)
        finally:
            if not self._sessions.finished:
                self._idle(await self._sessions.release(use))

    async def _open(self, use: str) -> Sandbox:
        self._turns.touch(self._key, self._sessions.clock.time())
        await self._write_turns()
        handle, sandbox = await self._transitions.open(self.owner, self.thread, use=use, sensitive=self.sensitive)
        self._turns.leases[use] = Lease(self._key, handle)
        return sandbox

    async def _end_lease(self, use: str, opening: asyncio.Task[Sandbox]) -> None:
        await asyncio.wait([opening])
        lease, now = self._turns.leases.pop(use, None), self._sessions.clock.time()
        if self._sessions.finished:
            return
        self._turns.touch(self._key, now)
        try:
            if lease is not None:
                # Other leases of it may start more meanwhile.
                for pid in tuple(opening.result().commands.started):
                    name, until = f"{lease.handle}/{pid}", now + COMMAND_LIMIT
                    await self._bindings.hold(*self._key, lease.handle, use=name, pid=pid, until=until)
        finally:
            self._idle(await self._sessions.release(use))

    async def _hold(self, name: str, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            msg = f"`seconds` is {seconds!r}. Pass 0 or more."
            raise ConfigError(msg)
        self._sessions.on_own_loop()
        await self._finish(self._begin_hold(name, seconds))

    async def _begin_hold(self, name: str, seconds: float) -> None:
        found = await self._bindings.find(self.owner, self.thread)
        if found is None:
            msg = f"The thread {self.thread!r} has no sandbox that could be kept awake. Use it first."
            raise ConfigError(msg)
        use = f"{found.handle}/{name}"
        if not seconds:
            await self._sessions.end_use(use)
            return
        until = self._sessions.clock.time() + seconds
        await self._bindings.hold(self.owner, self.thread, found.handle, use=use, pid=None, until=until)
        await self._sessions.sweeper.settle(found.handle)

    async def _new(self) -> str:
        before = await self._bindings.find(self.owner, self.thread)
        if before is not None and before.sandbox_id is None:
            return before.handle
        await self._bindings.point(self.owner, self.thread, None)
        now = self._sessions.clock.time()
        fresh = await self._bindings.current(self.owner, self.thread, now, sensitive=self.sensitive)
        if before is not None:
            self._schedule(before.handle)
        return fresh.handle

    async def _pause(self, handle: str | None) -> str | None:
        if handle is not None:
            await self._transitions.owned(self.owner, handle)
        else:
            binding = await self._bindings.find(self.owner, self.thread)
            if binding is None:
                return None
            handle = binding.handle
        return handle if await self._transitions.pause(handle) else None

    async def _resume(self, handle: str | None) -> str | None:
        before = await self._bindings.find(self.owner, self.thread)
        if handle is None:
            if before is None or before.sandbox_id is None:
                return None
            handle = before.handle
        use = secrets.token_hex(8)
        try:
            await self._transitions.open(self.owner, self.thread, use=use, handle=handle)
            await self._bindings.point(self.owner, self.thread, handle)
        finally:
            self._idle(await self._sessions.release(use))
        if before is not None and before.handle != handle:
            self._schedule(before.handle)
        return handle

    def _idle(self, handle: str | None) -> None:
        """Outside a turn, a lease's end is the end of all activity."""
        if handle is not None and not self._turns.has(self._key):
            self._schedule(handle)

    def _schedule(self, handle: str) -> None:
        self._sessions.schedule.add(handle, self._sessions.clock.time())
