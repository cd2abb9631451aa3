"""A policy together with what it has learned, for one process and by the caller's clock."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from sandbox_tools.policy.pause import Idle, PausePolicy, Period, Plan
from sandbox_tools.policy.tally import Tally

_NONE = Tally()


@dataclass(slots=True, kw_only=True)
class _Open:
    """An idle period until it is evidence.

    Attributes:
        back: When the user came back, in seconds since the epoch. inf: not yet.
        lead: As in `Period`. None: not known yet.
        priced: As in `Period`.
        replaced: Whether the same idle period was asked about again, so that this is no evidence of its own.
    """

    idle: Idle
    threshold: float | None
    back: float = math.inf
    lead: float | None = None
    priced: bool = False
    replaced: bool = False


class Learner:
    """Tells a policy of idle periods as they begin and end; each enters its statistics at the policy's horizon."""

    def __init__(self, policy: PausePolicy) -> None:
        self.policy = policy
        self._pools: dict[str, Tally] = {}
        self._owners: dict[tuple[str, str], Tally] = {}
        self._open: dict[str, _Open] = {}
        self._due: list[tuple[float, int, _Open]] = []
        self._number = 0

    def turn_ended(self, sandbox: str, idle: Idle) -> Plan:
        """An idle period of that sandbox begins; what to do in it."""
        self.advance(idle.began)
        if before := self._open.pop(sandbox, None):
            before.replaced = before.back == math.inf
            self._price(before, lead=math.inf)
        key = idle.terms.key
        plan = self.policy.plan(idle, self._pools.get(key), self._owners.get((key, idle.owner)))
        horizon = self.policy.horizon(idle.terms)
        if horizon is not None and not idle.vetoes:
            opened = self._open[sandbox] = _Open(idle=idle, threshold=plan.pause_after)
            self._number += 1
            heapq.heappush(self._due, (idle.began + horizon, self._number, opened))
        return plan

    def turn_started(self, sandbox: str, now: float) -> None:
        """It is over at `now`, in seconds since the epoch."""
        self.advance(now)
        opened = self._open.get(sandbox)
        if opened is not None and opened.back == math.inf:
            opened.back = max(opened.idle.began, now)

    def tool_called(self, sandbox: str, now: float) -> None:
        """The turn after it has called its first tool; a turn that ends without has called none."""
        self.advance(now)
        opened = self._open.pop(sandbox, None)
        if opened is not None:
            self._price(opened, lead=max(0.0, now - opened.back))

    def advance(self, now: float) -> None:
        """Let all periods enter whose horizon is reached."""
        while self._due and self._due[0][0] <= now:
            due, _, opened = heapq.heappop(self._due)
            if opened.replaced:
                continue
            # Of a turn that has called no tool so far, this much has passed unseen.
            lead = max(0.0, due - opened.back) if opened.lead is None else opened.lead
            delta = self.policy.learn(_period(opened, lead), opened.idle.terms)
            opened.priced = True
            self._add(opened, delta)
            key = opened.idle.terms.key, opened.idle.owner
            self._owners[key] = self._owners.get(key, _NONE) + delta

    def _price(self, opened: _Open, *, lead: float) -> None:
        if opened.priced or opened.back == math.inf:
            return

        opened.lead = lead
        self._add(opened, self.policy.price(_period(opened, lead), opened.idle.terms))
        opened.priced = True

    def _add(self, opened: _Open, delta: Tally) -> None:
        key = opened.idle.terms.key
        self._pools[key] = self._pools.get(key, _NONE) + delta

    def snapshot(self) -> dict[str, dict[str, bytes]]:
        """What has been learned, as plain data: under each key of terms, the pool's tally as "" and the owners'.

        Periods that have not entered yet are not in it.
        """
        saved = {key: {"": tally.to_bytes()} for key, tally in self._pools.items()}
        for (key, owner), tally in self._owners.items():
            saved[key][f"owner:{owner}"] = tally.to_bytes()
        return saved

    def restore(self, saved: dict[str, dict[str, bytes]]) -> None:
        """Go on from a snapshot, in place of what was learned here."""
        self._pools = {key: Tally.from_bytes(tallies[""]) for key, tallies in saved.items()}
        self._owners = {
            (key, name.removeprefix("owner:")): Tally.from_bytes(data)
            for key, tallies in saved.items()
            for name, data in tallies.items()
            if name
        }


def _period(opened: _Open, lead: float) -> Period:
    gap = opened.back - opened.idle.began
    return Period(gap=gap, lead=lead, threshold=opened.threshold, priced=opened.priced)
