"""The registry an app holds: gives each conversation its sandbox, and knows when a turn has ended."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import threading
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sandbox_tools import paths
from sandbox_tools.errors import ConfigError, ExecutionTimeoutError, SandboxError
from sandbox_tools.policy.pause import PauseAfter, PausePolicy
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.session.clock import Clock, SystemClock
from sandbox_tools.session.sweeper import Sweeper
from sandbox_tools.session.transitions import HOLD, OWNER, Transitions

if TYPE_CHECKING:
    from sandbox_tools.client import Client, Sandbox

T = TypeVar("T")

CLOSING = 60.0
"""Seconds `aclose` gives to the pauses still to be made; the server's own timers make those it leaves."""


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


class Sessions:
    """Whose sandbox is whose. One per process and event loop; several processes may share the same bindings.

    It belongs to the event loop that first uses it. `SandboxToolkit` finds its way there from synchronous code.

    Args:
        client: Where the sandboxes are. None: a `Client()` of its own, closed with it.
        bindings: Which thread has which sandbox. None: a file in the state directory, one per provider.
        policy: When to pause. None: `PauseAfter(30)`.
        template: What new sandboxes are made from. None: the provider's default.
        clock: Tests pass a `ManualClock`. None: the machine's.
    """

    def __init__(
        self,
        client: Client | None = None,
        *,
        bindings: SqliteBindings | None = None,
        policy: PausePolicy | None = None,
        template: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        if client is None:
            from sandbox_tools.client import Client

            self._owned_client: Client | None = Client()
            client = self._owned_client
        else:
            self._owned_client = None
        self._owned_bindings = None
        if bindings is None:
            bindings = self._owned_bindings = SqliteBindings(_default_bindings(client))
        self._clock = clock or SystemClock()
        self._bindings = bindings
        self._client = client
        self._holder = secrets.token_hex(8)
        self._transitions = Transitions(
            client, bindings, policy or PauseAfter(30), self._clock, holder=self._holder, template=template
        )
        self._leases: dict[str, str] = {}
        self._turns: dict[tuple[str, str], set[str]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._claiming = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeper: Sweeper | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._closed = self._finished = False

    def session(self, thread: str, *, owner: str = "default") -> Session:
        """The conversation `thread` of `owner`; nothing is created until it is used.

        Raises:
            ConfigError: `thread` or `owner` is empty.
        """
        if not thread or not owner:
            msg = f"`thread` is {thread!r} and `owner` is {owner!r}. Neither may be empty."
            raise ConfigError(msg)
        return Session(self, thread, owner)

    async def sweep(self) -> None:
        """Do now, and to its end, what the policy has made due; the registry does so by itself in the background."""
        await self._on_own_loop().sweep()

    async def aclose(self) -> None:
        """Pause what this registry has used and is idle, and close; what is in use is left to the server's timer."""
        if self._closed:
            return
        sweeper = self._on_own_loop()
        self._closed = True
        assert self._sweeping is not None
        self._sweeping.cancel()
        try:
            async with asyncio.timeout(CLOSING):
                while self._tasks:
                    await asyncio.wait(self._tasks)
                await asyncio.gather(*(sweeper.settle(handle) for handle in list(self._transitions.awake)))
        except TimeoutError:
            pass
        finally:
            self._finished = True
            if self._owned_bindings is not None:
                await self._owned_bindings.aclose()
            if self._owned_client is not None:
                await self._owned_client.aclose()

    async def __aenter__(self) -> Self:
        self._on_own_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def claim(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        """The loop this registry belongs to: `loop`, if nobody claimed it before. Safe from any thread."""
        with self._claiming:
            if self._loop is None:
                self._loop = loop
            return self._loop

    def _on_own_loop(self) -> Sweeper:
        loop = asyncio.get_running_loop()
        if self.claim(loop) is not loop:
            msg = "These `Sessions` belong to another event loop. Make one `Sessions` per loop, or close it before."
            raise ConfigError(msg)
        if self._closed:
            msg = "These `Sessions` are closed. Make new ones."
            raise ConfigError(msg)
        if self._sweeper is None:
            self._sweeper = Sweeper(self._clock, settle=self._settle, beat=self._beat, spawn=self.spawn)
            self._sweeping = loop.create_task(self._sweeper.run())
        return self._sweeper

    async def _settle(self, handle: str) -> float | None:
        return await self._transitions.settle(handle, closing=self._closed)

    async def _beat(self) -> None:
        if self._leases or self._turns or self._tasks:
            await self._transitions.beat(set(self._leases.values()))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that is not cancelled with whoever waits for it, and that `aclose` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _default_bindings(client: Client) -> Path:
    """One file for each control plane: a sandbox of one is no lost sandbox of the other."""
    name = "sessions"
    if client.address.url_named or client.dialect.default_domain is not None:
        place = hashlib.sha256(client.address.api_url.encode()).hexdigest()[:8]
        name += f"-{client.dialect.name}-{place}"
    return paths.state_directory() / f"{name}.db"


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
                # Whatever was known of the sandbox, the next lease asks the server.
                self._transitions.awake.pop(self._sessions._leases.get(use, ""), None)
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
        use = self._turn_use(run)
        self._sessions._turns.setdefault((self.owner, self.thread), set()).add(use)
        await self._finish(
            self._bindings.begin_turn(
                self.owner,
                self.thread,
                use=use,
                holder=self._sessions._holder,
                until=self._sessions._clock.time() + HOLD,
            )
        )

    async def turn_ended(self, run: str = "turn") -> None:
        """Note that it has ended, and do what the policy says at once; later what it says for later.

        A pause that fails is logged and tried again, not raised: the turn has its outcome.
        """
        await self._finish(self._end_turn(run))

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

    async def _end_turn(self, run: str) -> None:
        key, use = (self.owner, self.thread), self._turn_use(run)
        runs = self._sessions._turns.get(key, set())
        if use not in runs:
            return
        runs.discard(use)
        if not runs:
            self._sessions._turns.pop(key, None)
        handle = await self._bindings.end_use(use, self._sessions._clock.time())
        if handle is not None and self._sessions._sweeper is not None:
            await self._sessions._sweeper.settle(handle)

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
