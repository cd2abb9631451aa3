"""The registry an app holds: what its conversations share, from the event loop to the last pause."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sandbox_tools import paths
from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.pause import PauseAfter, PausePolicy
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.session.clock import Clock, SystemClock
from sandbox_tools.session.session import Session
from sandbox_tools.session.sweeper import Sweeper
from sandbox_tools.session.transitions import Transitions

if TYPE_CHECKING:
    from sandbox_tools.client import Client

T = TypeVar("T")

CLOSING = 60.0
"""Seconds `aclose` gives to the pauses still to be made; the server's own timers make those it leaves."""


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
        self._turns: dict[tuple[str, str], dict[str, bool]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._noting = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
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
                await asyncio.wait([self._sweeping])
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
        with self._noting:
            if self.loop is None:
                self.loop = loop
            return self.loop

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
