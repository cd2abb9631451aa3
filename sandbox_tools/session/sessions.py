"""The registry an app holds: what its conversations share, from the event loop to the last pause."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import logging
import secrets
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sandbox_tools import paths
from sandbox_tools.errors import ConfigError, SandboxError
from sandbox_tools.policy.adaptive import AdaptivePause
from sandbox_tools.policy.pause import PausePolicy
from sandbox_tools.session.bindings import Bindings, SqliteBindings
from sandbox_tools.session.clock import Clock, SystemClock
from sandbox_tools.session.evidence import Evidence
from sandbox_tools.session.holds import Holds
from sandbox_tools.session.retention import Keeper, Retention
from sandbox_tools.session.schedule import Round, Schedule
from sandbox_tools.session.session import Session
from sandbox_tools.session.sweeper import Sweeper
from sandbox_tools.session.transitions import Transitions
from sandbox_tools.session.turns import Turns

if TYPE_CHECKING:
    from sandbox_tools.client import Client
    from sandbox_tools.client.dialects import Price

log = logging.getLogger("sandbox_tools.session")

T = TypeVar("T")

CLOSING = 60.0
"""Seconds `aclose` gives to the pauses still to be made; the server's own timers make those it leaves."""

TAKE_OVER = 5.0
"""Seconds between two looks at what dead processes have left awake."""

ABSORB = 15.0
"""Seconds between two looks at idle periods that have become evidence."""


class Sessions:
    """Whose sandbox is whose. One per process and event loop; several processes may share the same bindings.

    It belongs to the event loop that first uses it. `SandboxToolkit` finds its way there from synchronous code.

    Args:
        client: Where the sandboxes are. None: a `Client()` of its own, closed with it.
        bindings: Which thread has which sandbox. None: a file in the state directory, one per provider.
        policy: When to freeze and when to pause. None: `AdaptivePause()`.
        template: What new sandboxes are made from. None: the provider's default.
        wait_price: What a second that a user waits is worth, in dollars; 0.01 is a person at $36 an hour.
        price: What a second of a sandbox costs. None: the provider's own price, or E2B's where there is none.
        early_resume: Whether a paused sandbox is woken when a turn starts, while the model still thinks.
        turn_limit: Seconds without a tool call after which an open turn counts as forgotten by whoever should have
            ended it, and keeps its sandbox awake no longer.
        expiry: Seconds after which what a process held is free if it has not been renewed, because that process is dead
            or stuck; it is renewed four times as often. The same for all processes that share bindings.
        retention: What happens to sandboxes that sleep for long. None: nothing.
        clock: Tests pass a `ManualClock`. None: the machine's.
    """

    def __init__(
        self,
        client: Client | None = None,
        *,
        bindings: Bindings | None = None,
        policy: PausePolicy | None = None,
        template: str | None = None,
        wait_price: float = 0.01,
        price: Price | None = None,
        early_resume: bool = True,
        turn_limit: float = 1800.0,
        expiry: float = 60.0,
        retention: Retention | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._owned_client = self._owned_bindings = None
        if client is None:
            from sandbox_tools.client import Client

            client = self._owned_client = Client()
        if bindings is None:
            bindings = self._owned_bindings = SqliteBindings(default_bindings(client))
        self.clock = clock or SystemClock()
        self.bindings = bindings
        self.client = client
        self.holder = secrets.token_hex(8)
        self.turn_limit = turn_limit
        self.expiry = expiry
        self.turns = Turns()
        self.evidence = Evidence(
            client,
            bindings,
            policy or AdaptivePause(),
            self.clock,
            wait_price=wait_price,
            price=price,
            early_resume=early_resume,
        )
        self.transitions = Transitions(
            client, bindings, self.evidence, self.clock, holder=self.holder, expiry=expiry, template=template
        )
        self.keeper = Keeper(self.transitions, bindings, self.clock, retention or Retention())
        rounds = [
            Round(expiry / 4, self._beat),
            Round(TAKE_OVER, self._take_over),
            Round(ABSORB, self.evidence.absorb),
            Round(self.keeper.every, self.keeper.look),
        ]
        self.schedule = Schedule(self.clock, settle=self._settle, rounds=rounds, spawn=self.spawn)
        self.holds = Holds(self.transitions, bindings, self.clock)
        self.sweeper = Sweeper(self.transitions, self.holds, bindings, self.evidence, self.clock, self.schedule)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unended: set[str] = set()
        self._sweeping: asyncio.Task[None] | None = None
        self._closed = False
        self.finished = False
        """Whether nothing may be written any more."""

    def session(self, thread: str, *, owner: str = "default", sensitive: bool = False) -> Session:
        """The conversation `thread` of `owner`; nothing is created until it is used.

        Args:
            sensitive: Never write the memory of a sandbox made in it to a disk: a pause keeps files only, and where
                the provider cannot do that, it ends the sandbox. The conversation is told what it has lost each time.

        Raises:
            ConfigError: `thread` or `owner` is empty.
        """
        if not thread or not owner:
            msg = f"`thread` is {thread!r} and `owner` is {owner!r}. Neither may be empty."
            raise ConfigError(msg)
        return Session(self, thread, owner, sensitive=sensitive)

    async def sweep(self) -> None:
        """Do now, and to its end, what the policy has made due; the registry does so by itself in the background."""
        self.on_own_loop()
        await self.schedule.sweep()

    async def aclose(self) -> None:
        """Pause what this registry has used and is idle, and close; what is in use is left to the server's timer."""
        if self._closed:
            return
        self.on_own_loop()
        self._closed = True
        assert self._sweeping is not None
        self._sweeping.cancel()
        try:
            async with asyncio.timeout(CLOSING):
                await asyncio.wait([self._sweeping])
                while self._tasks:
                    await asyncio.wait(self._tasks)
                awake = list(self.transitions.awake)
                await asyncio.gather(*(self.sweeper.settle(handle, closing=True) for handle in awake))
        except TimeoutError:
            pass
        finally:
            self.finished = True
            if self._owned_bindings is not None:
                await self._owned_bindings.aclose()
            if self._owned_client is not None:
                await self._owned_client.aclose()

    async def __aenter__(self) -> Self:
        self.on_own_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def claim(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        """The loop this registry belongs to: `loop`, if nobody claimed it before. Safe from any thread."""
        with self.turns.noting:
            if self.loop is None:
                self.loop = loop
            return self.loop

    def on_own_loop(self) -> None:
        """Begin to sweep, if nobody has yet.

        Raises:
            ConfigError: This is another loop than its own, or it is closed.
        """
        loop = asyncio.get_running_loop()
        if self.claim(loop) is not loop:
            msg = "These `Sessions` belong to another event loop. Make one `Sessions` per loop, or close it before."
            raise ConfigError(msg)
        if self._closed:
            msg = "These `Sessions` are closed. Make new ones."
            raise ConfigError(msg)
        if self._sweeping is None:
            # In a context of its own: it outlives the run and the trace that happen to begin it.
            self._sweeping = loop.create_task(self.schedule.run(), context=contextvars.Context())

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that is not cancelled with whoever waits for it, and that `aclose` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def release(self, use: str) -> str | None:
        """End a use; where that cannot be written now, with a later beat: it would be renewed for ever else.

        Returns:
            The handle of its sandbox. None: it has none, or this is put off.
        """
        try:
            return await self.bindings.end_use(use, self.clock.time())
        except SandboxError as error:
            log.warning("could not end a use of a sandbox, trying again soon: %s", error)
            self._unended.add(use)
            return None

    async def end_use(self, use: str) -> None:
        """End a turn or a hold, and decide on the sandbox that may be idle now."""
        if (handle := await self.release(use)) is not None:
            await self.sweeper.settle(handle)

    async def _settle(self, handle: str) -> None:
        await self.sweeper.settle(handle, closing=self._closed)

    async def _take_over(self) -> None:
        await self.sweeper.take_over()

    async def _beat(self) -> None:
        """Renew what this registry holds: its uses, its transitions, and the server's timers under them."""
        if not (self.turns or self._tasks or self._unended):
            return
        now, unended = self.clock.time(), self._unended
        self._unended = set()
        for use in unended:
            await self.end_use(use)
        for key, use in self.turns.forgotten(now - self.turn_limit):
            said = "a turn of the thread %r has been open for %g s without a tool call: it counts as ended"
            log.warning(said, key[1], self.turn_limit, extra={"owner_id": key[0], "thread_id": key[1]})
            self.turns.drop(key, use)
            await self.end_use(use)
        transitions = self.transitions.under_way
        await self.bindings.renew(self.holder, transitions=transitions, now=now, until=now + self.expiry)
        used = {lease.handle for lease in self.turns.leases.values()}
        for owner, thread in self.turns.threads():
            if (found := await self.bindings.find(owner, thread)) is not None:
                used.add(found.handle)
        for handle in used:
            await self.holds.prolong(handle)


def default_bindings(client: Client) -> Path:
    """One file for each control plane: a sandbox of one is no lost sandbox of the other."""
    name = "sessions"
    if client.address.url_named or client.dialect.default_domain is not None:
        place = hashlib.sha256(client.address.api_url.encode()).hexdigest()[:8]
        name += f"-{client.dialect.name}-{place}"
    return paths.state_directory() / f"{name}.db"
