"""What is known when the policy is asked, and what is noted for it and for the savings report."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sandbox_tools import telemetry
from sandbox_tools.errors import SandboxError
from sandbox_tools.policy.cost import GIB_PRICE, VCPU_PRICE, Terms, measured
from sandbox_tools.policy.pause import Idle, PausePolicy, Period, Plan
from sandbox_tools.policy.savings import Change, State
from sandbox_tools.policy.tally import Tally
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.rows import Binding, Ended

if TYPE_CHECKING:
    from sandbox_tools.client import Client
    from sandbox_tools.client.dialects import Price

log = logging.getLogger("sandbox_tools.session")

USUAL = (2.0, 0.5)
"""vCPU and GiB of a sandbox that nobody has looked at yet."""

RARE = 0.05
"""The share of an owner's turns that use their sandbox below which none is woken ahead of its use: at the default price
of waiting, sandboxes that were woken for nothing then cost more than the waiting they save."""


class Evidence:
    """One registry's view of its sandboxes, which are all made from one template and so cost the same.

    Args:
        wait_price, price, early_resume: As for `Sessions`.
    """

    def __init__(
        self,
        client: Client,
        bindings: Bindings,
        policy: PausePolicy,
        clock: Clock,
        *,
        wait_price: float,
        price: Price | None,
        early_resume: bool,
    ) -> None:
        self._client = client
        self._bindings = bindings
        self._policy = policy
        self._clock = clock
        self._wait_price = wait_price
        self._price = price or client.dialect.price
        self._size: tuple[float, float] | None = None
        self._pause: float | None = None
        self._resume: float | None = None
        self._known: dict[str, Terms] = {}
        self._uses: dict[str, float] = {}
        self.early_resume = early_resume

    def pause_took(self, seconds: float) -> None:
        """A pause has been seen from its beginning to its end."""
        self._pause = measured(self._pause, seconds)

    def resume_took(self, seconds: float) -> None:
        """So has a resume."""
        self._resume = measured(self._resume, seconds)

    async def plan(self, held: Binding) -> Plan:
        """What to do in the idle period that has begun; it is evidence from now on."""
        await self._look(held)
        terms = self._terms()
        pool, own = await self._bindings.tallies(held.owner, terms.key)
        plan = self._policy.plan(Idle(owner=held.owner, began=held.idle_since, terms=terms), pool, own)
        horizon = self._policy.horizon(terms)
        # Past the horizon another process has learned from it already.
        if horizon is not None and held.idle_since > self._clock.time() - horizon:
            await self._bindings.begin_idle(
                held.handle, owner=held.owner, began=held.idle_since, terms=terms.key, threshold=plan.pause_after
            )
        return plan

    async def absorb(self) -> None:
        """Let all idle periods become evidence whose horizon is reached."""
        for key, terms in list(self._known.items()):
            horizon = self._policy.horizon(terms)
            if horizon is not None:
                now, over = self._clock.time(), partial(self._over, terms)
                await self._bindings.price(key, now=now, learn=partial(over, self._policy.price))
                await self._bindings.absorb(key, began_before=now - horizon, learn=partial(over, self._policy.learn))

    async def changed(self, held: Binding, state: State, *, waited: float = 0.0) -> None:
        """A line for the savings report: what the sandbox does from now on.

        Args:
            waited: Seconds that its user has just waited for it.
        """
        terms = self._terms()
        change = Change(
            at=self._clock.time(),
            state=state,
            idle_since=held.idle_since,
            running=terms.running,
            frozen=terms.frozen or 0.0,
            waited=waited,
        )
        log.info("%s is %s", held.handle, state, extra=held.ids)
        before, seconds = await self._bindings.record(held.handle, held.owner, held.thread, change)
        if before in ("running", "frozen", "paused"):
            telemetry.passed(before, seconds)

    def turn_was(self, owner: str, *, used: bool) -> None:
        """A turn has ended, and has used its sandbox or not."""
        self._uses[owner] = measured(self._uses.get(owner, 1.0), float(used))

    def expects_use(self, owner: str) -> bool:
        """Whether a turn that begins now is worth waking its sandbox for."""
        return self.early_resume and self._uses.get(owner, 1.0) >= RARE

    async def _look(self, held: Binding) -> None:
        if self._size is None and held.sandbox_id is not None:
            with contextlib.suppress(SandboxError):
                info = await self._client.info(held.sandbox_id)
                if info.cpu_count and info.memory_mb:
                    self._size = info.cpu_count, info.memory_mb / 1024

    def _terms(self) -> Terms:
        vcpu, gib = self._size or USUAL
        dialect, price = self._client.dialect, self._price
        terms = Terms.of(
            vcpu=vcpu,
            gib=gib,
            vcpu_price=price.vcpu if price else VCPU_PRICE,
            gib_price=price.gib if price else GIB_PRICE,
            pause_seconds=self._pause or dialect.pause_per_gib * gib,
            resume_seconds=self._resume or dialect.resume_seconds,
            wait_price=self._wait_price,
            early_resume=self.early_resume,
            can_freeze=dialect.can_freeze,
            abortable=dialect.abortable,
        )
        self._known[terms.key] = terms
        return terms

    def _over(self, terms: Terms, learn: Callable[[Period, Terms], Tally], ended: Ended) -> Tally:
        gap = math.inf if ended.ended is None else max(0.0, ended.ended - ended.began)
        lead = math.inf if ended.lead is None else ended.lead
        return learn(Period(gap=gap, lead=lead, threshold=ended.threshold, priced=ended.priced), terms)
