"""Asks the policy about what is idle, and does what it says: nothing else freezes or pauses of its own accord."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox_tools.errors import SandboxError
from sandbox_tools.policy.pause import Plan
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.evidence import Evidence
from sandbox_tools.session.holds import Holds
from sandbox_tools.session.rows import Binding
from sandbox_tools.session.transitions import Transitions

if TYPE_CHECKING:
    from sandbox_tools.session.schedule import Schedule

log = logging.getLogger("sandbox_tools.session")

GRACE = 8
"""Seconds by which the server's own timer follows the policy's pause, so that it acts only if we do not."""

RETRY = 30.0
"""Seconds until a pause that failed is tried again."""

LATE = 3.0
"""Seconds past its time after which a sandbox counts as left behind by the process that should have paused it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What was decided for one idle period, so that it is decided once."""

    began: float
    plan: Plan


class Sweeper:
    """What happens to a sandbox that may be idle.

    Args:
        schedule: Where it puts what it has to look at again.
    """

    def __init__(
        self,
        transitions: Transitions,
        holds: Holds,
        bindings: Bindings,
        evidence: Evidence,
        clock: Clock,
        schedule: Schedule,
    ) -> None:
        self._transitions = transitions
        self._holds = holds
        self._bindings = bindings
        self._evidence = evidence
        self._clock = clock
        self._schedule = schedule
        self._plans: dict[str, Planned] = {}

    async def settle(self, handle: str, *, closing: bool = False) -> None:
        """Decide on that sandbox now. A failure is logged and tried again, because nobody waits for its outcome.

        Args:
            closing: The registry is about to close: what would be paused later is paused now.
        """
        self._schedule.discard(handle)
        try:
            again = await self._settle(handle, closing)
        except Exception as error:
            unexpected = not isinstance(error, SandboxError)
            said, ids = "could not pause %s, trying again in %g s: %s", {"sandbox_handle": handle}
            log.warning(said, handle, RETRY, error, exc_info=unexpected, extra=ids)
            again = self._clock.time() + RETRY
        if again is None:
            self._plans.pop(handle, None)
        else:
            self._schedule.add(handle, again)

    async def take_over(self) -> None:
        """Decide on what other processes should have paused and have not, because they are dead or stuck."""
        now = self._clock.time()
        left = await self._bindings.list_idle(now - LATE, now)
        # What is due here soon anyway has been tried, and will be again.
        await asyncio.gather(*(self.settle(handle) for handle in left if self._schedule.due(handle) > now + RETRY))

    async def _settle(self, handle: str, closing: bool) -> float | None:
        """When to ask again, in seconds since the epoch. None: when it has been used again."""
        if (again := await self._holds.look(handle)) is not None:
            return again
        async with self._transitions.exclusive(handle, unless="used") as held:
            if held is not None and held.state == "creating":
                return self._clock.time() if await self._transitions.find_created(held) else None
            if held is None or held.sandbox_id is None or held.state == "paused":
                return None
            now, plan = self._clock.time(), await self._planned(held)
            if plan.pause_after is None:
                await self._transitions.leave(held)
                return None
            pause_at = held.idle_since + plan.pause_after
            if closing or pause_at <= now:
                log.info("pausing %s: %s", handle, plan.reason, extra=held.ids)
                await self._transitions.put_to_sleep(held)
                return None
            return await self._wait(held, plan, pause_at)

    async def _planned(self, held: Binding) -> Plan:
        known = self._plans.get(held.handle)
        if known is None or known.began != held.idle_since:
            known = self._plans[held.handle] = Planned(held.idle_since, await self._evidence.plan(held))
        return known.plan

    async def _wait(self, held: Binding, plan: Plan, pause_at: float) -> float:
        """Nothing is due but perhaps a freeze; from here on the server's timer makes the pause if nobody else does."""
        now, frozen, freeze_at = self._clock.time(), held.state == "frozen", math.inf
        await self._transitions.plant(held)
        if plan.freeze_after is not None and not frozen and self._transitions.client.dialect.can_freeze:
            freeze_at = held.idle_since + plan.freeze_after
            if freeze_at <= now:
                frozen = await self._transitions.freeze(held)
                freeze_at = math.inf if frozen else now + RETRY
        await self._transitions.arm(held, math.ceil(pause_at - now) + GRACE, due_at=pause_at, frozen=frozen)
        return min(pause_at, freeze_at)
