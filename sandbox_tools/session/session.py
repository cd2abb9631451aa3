"""One conversation: lends out its sandbox, knows its turns, and does what its model asks."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from sandbox_tools.errors import ExecutionTimeoutError, SandboxError
from sandbox_tools.session.transitions import HOLD, OWNER

if TYPE_CHECKING:
    from sandbox_tools.client import Sandbox
    from sandbox_tools.session.sessions import Sessions

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PausedSandbox:
    """One paused sandbox of an owner, as its model may see it.

    Attributes:
        handle: What `Session.resume` takes.
        thread: The conversation it was made for.
        paused_at: When it was paused.
        age: Seconds since then.
        snapshot_bytes: Its size on disk. None: the provider does not say.
        current: Whether it is the asking thread's own.
    """

    handle: str
    thread: str
    paused_at: datetime
    age: float
    snapshot_bytes: int | None
    current: bool


class Session:
    """One conversation of one owner; made by `Sessions.session`, cheap, and not bound to one sandbox for life."""

    def __init__(self, sessions: Sessions, thread: str, owner: str) -> None:
        self.thread = thread
        self.owner = owner
        self._sessions = sessions
        self._transitions = sessions._transitions
        self._bindings = sessions._bindings

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Sandbox]:
        """The thread's sandbox, created or woken if need be; nothing pauses it inside the `async with`.

        Raises:
            SandboxBusyError: Another process has been creating or pausing it for a quarter of an hour.
            OwnershipError: The sandbox does not bear this owner's stamp.
        """
        self._sessions._on_own_loop()
        use = secrets.token_hex(8)
        opening = self._sessions.spawn(self._open(use))
        try:
            yield await asyncio.shield(opening)
        except SandboxError as error:
            if not isinstance(error, ExecutionTimeoutError):
                self._transitions.distrust(self._sessions._leases.get(use))
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
        """Note that the turn `run` is open; again for the same run changes nothing."""
        self._sessions._on_own_loop()
        self.note_turn(run)
        await self._finish(self.write_turns())

    async def turn_ended(self, run: str = "turn") -> None:
        """Note that it has ended, and do what the policy says at once; later what it says for later.

        A pause that fails is logged and tried again, not raised: the turn has its outcome.
        """
        if self.drop_turn(run):
            await self._finish(self.end_turn(run))

    def note_turn(self, run: str) -> None:
        """The part of `turn_started` that needs no event loop; the next lease does the rest, if nobody does before."""
        with self._sessions._noting:
            turns = self._sessions._turns.setdefault((self.owner, self.thread), {})
            turns.setdefault(self._turn_use(run), False)

    def drop_turn(self, run: str) -> bool:
        """The part of `turn_ended` that needs no event loop. False: there is no such turn."""
        key = (self.owner, self.thread)
        with self._sessions._noting:
            turns = self._sessions._turns.get(key, {})
            known = turns.pop(self._turn_use(run), None) is not None
            if not turns:
                self._sessions._turns.pop(key, None)
        return known

    async def write_turns(self) -> None:
        """Let other processes know of the turns noted here."""
        with self._sessions._noting:
            turns = self._sessions._turns.get((self.owner, self.thread), {})
            unwritten = [use for use, written in turns.items() if not written]
            turns.update(dict.fromkeys(unwritten, True))
        for use in unwritten:
            until = self._sessions._clock.time() + HOLD
            await self._bindings.begin_turn(
                self.owner, self.thread, use=use, holder=self._sessions._holder, until=until
            )

    async def end_turn(self, run: str) -> None:
        """The rest of `turn_ended`, on the loop of the registry."""
        handle = await self._bindings.end_use(self._turn_use(run), self._sessions._clock.time())
        if handle is not None and self._sessions._sweeper is not None:
            await self._sessions._sweeper.settle(handle)

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
        self._sessions._on_own_loop()
        return await self._finish(self._pause(handle))

    async def resume(self, handle: str | None = None) -> str | None:
        """Wake a sandbox of the owner and make it the thread's own; the one it had before stays what it is.

        Args:
            handle: Which one. None: the thread's own.

        Returns:
            Its handle. None: the thread has no sandbox.

        Raises:
            SandboxExpiredError: It is gone.
            OwnershipError: The owner has no such handle.
        """
        self._sessions._on_own_loop()
        return await self._finish(self._resume(handle))

    async def list_paused(self) -> list[PausedSandbox]:
        """The owner's paused sandboxes, the last paused first."""
        own = await self._bindings.find(self.owner, self.thread)
        known = {binding.sandbox_id: binding for binding in await self._bindings.of_owner(self.owner)}
        found = []
        async for info in self._transitions.client.list(state="paused", metadata={OWNER: self.owner}):
            binding = known.get(info.sandbox_id)
            if binding is None:
                continue
            paused_at = info.end_at.astimezone(UTC)
            found.append(
                PausedSandbox(
                    handle=binding.handle,
                    thread=binding.thread,
                    paused_at=paused_at,
                    age=max(0.0, self._sessions._clock.time() - paused_at.timestamp()),
                    snapshot_bytes=info.snapshot_bytes,
                    current=own is not None and own.handle == binding.handle,
                )
            )
        return sorted(found, key=lambda paused: paused.paused_at, reverse=True)

    async def kill(self) -> bool:
        """End the thread's sandbox, its state with it, and forget it. True: there was one.

        Raises:
            SandboxBusyError: Another process is creating or pausing it.
        """
        self._sessions._on_own_loop()
        binding = await self._bindings.find(self.owner, self.thread)
        return binding is not None and await self._finish(self._transitions.kill(binding.handle))

    async def take_lost(self) -> bool:
        """Whether the thread's sandbox was found gone, so that the next one starts empty; True once for each loss."""
        return await self._bindings.take_lost(self.owner, self.thread)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Its outcome; cancelling the caller does not cancel the work."""
        return await asyncio.shield(self._sessions.spawn(work))

    def _turn_use(self, run: str) -> str:
        return f"{self._sessions._holder}/{self.owner}/{self.thread}/{run}"

    async def _open(self, use: str) -> Sandbox:
        await self.write_turns()
        handle, sandbox = await self._transitions.open(self.owner, self.thread, use=use)
        self._sessions._leases[use] = handle
        return sandbox

    async def _end_lease(self, use: str, opening: asyncio.Task[Sandbox]) -> None:
        await asyncio.wait([opening])
        self._sessions._leases.pop(use, None)
        if self._sessions._finished:
            return
        handle = await self._bindings.end_use(use, self._sessions._clock.time())
        self._idle(handle)

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
            self._idle(await self._bindings.end_use(use, self._sessions._clock.time()))
        if before is not None and before.handle != handle:
            self._schedule(before.handle)
        return handle

    def _idle(self, handle: str | None) -> None:
        """Outside a turn, a lease's end is the end of all activity."""
        if handle is not None and (self.owner, self.thread) not in self._sessions._turns:
            self._schedule(handle)

    def _schedule(self, handle: str) -> None:
        if self._sessions._sweeper is not None:
            self._sessions._sweeper.schedule(handle, self._sessions._clock.time())
