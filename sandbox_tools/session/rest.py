"""How one sandbox comes to rest: frozen, paused, or left to the server's timer, under the guard of its binding."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

from sandbox_tools import telemetry
from sandbox_tools.errors import ConflictError, NotFoundError, SandboxError, SandboxExpiredError
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.evidence import Evidence
from sandbox_tools.session.rows import Binding, Hint, Unless
from sandbox_tools.session.stamps import Stamps

if TYPE_CHECKING:
    from sandbox_tools.client import Client, Sandbox

log = logging.getLogger("sandbox_tools.session")

AWAKE = 300
"""Seconds the server is asked to keep a sandbox awake; renewed while a lease is held or a turn is open."""

PATIENCE = 900.0
"""Seconds a lease waits for another process's transition; a first create may build the local template in it."""

LOOK = 30.0
"""Seconds until another look for what an unanswered create has made."""

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


class Rest:
    """What a sandbox that nobody uses goes through, and what is known of those that are awake.

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
        self.under_way: set[str] = set()
        """The handles that this process is changing, or about to."""
        self.stamps = Stamps(client, bindings, clock)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def distrust(self, handle: str | None) -> None:
        """Have the next lease ask the server, whatever was known of the sandbox."""
        if awake := self.awake.get(handle or ""):
            awake.seen_at = 0

    def saw(self, handle: str, sandbox: Sandbox) -> None:
        """It runs now."""
        self.awake[handle] = Awake(sandbox=sandbox, seen_at=self.clock.time())

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
                with telemetry.span("sandbox.pause", held.ids):
                    paused = await self.client.pause(held.sandbox_id, memory=keeps == "memory")
        except GONE:
            await self.forget(held, "lost")
            return False
        if keeps == "nothing":
            await self.forget(held, "lost")
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
            with telemetry.span("sandbox.freeze", held.ids):
                frozen = await self.client.freeze(held.sandbox_id)
        except (ConflictError, *GONE) as error:
            # That it is gone is for the next lease, or the pause that is due later, to find out.
            log.info("could not freeze %s: %s", held.handle, error, extra=held.ids)
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
            log.warning("could not set the timeout of %s: %s", held.handle, error, extra=held.ids)
            state = "unknown"
        await self.bindings.end_transition(
            held,
            state=state,
            sandbox_id=held.sandbox_id,
            awake_until=self.clock.time() + seconds,
            due_at=due_at,
        )

    async def find_created(self, held: Binding) -> bool:
        """Bind what a create has made whose process died before the answer; False: there is nothing, perhaps yet."""
        now, made = self.clock.time(), await self.stamps.find(held)
        if made:
            return await self.bindings.end_transition(held, state="unknown", sandbox_id=made[0].sandbox_id, due_at=now)
        state: Hint = "creating" if now - held.idle_since < PATIENCE else "new"
        await self.bindings.end_transition(held, state=state, sandbox_id=None, due_at=now + LOOK)
        return False

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

    async def forget(self, held: Binding, why: Literal["killed", "lost"]) -> None:
        """Drop the binding of one that is no more, in a transition."""
        self.awake.pop(held.handle, None)
        self.stamps.forget(held.sandbox_id)
        if await self.bindings.forget(held, lost=why == "lost"):
            await self.evidence.changed(held, why)
            if why == "lost":
                log.warning("the sandbox %s is gone, and its state with it", held.handle, extra=held.ids)

    def _lock(self, handle: str) -> asyncio.Lock:
        """The handle's own; it lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(handle, asyncio.Lock())

    @contextlib.asynccontextmanager
    async def _transition(self, handle: str, *, unless: Unless) -> AsyncIterator[Binding | None]:
        """Hold the exclusive right, if it is to be had; what the body has not ended by then ends with nothing known."""
        # Whoever dies while it looks after what is idle is not to keep the next message waiting for long; a beat comes
        # before this is over too.
        now, expiry = self.clock.time(), self.expiry / 3 if unless == "used" else self.expiry
        self.under_way.add(handle)
        try:
            held = await self.bindings.begin_transition(
                handle, holder=self.holder, now=now, until=now + expiry, unless=unless
            )
            try:
                yield held
            finally:
                if held is not None:
                    await self.bindings.abandon(held)
        finally:
            self.under_way.discard(handle)
