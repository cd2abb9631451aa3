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
    idle: Idle
    threshold: float | None
    gap: float = math.inf
    lead: float = 0.0


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
        key = idle.terms.key
        plan = self.policy.plan(idle, self._pools.get(key), self._owners.get((key, idle.owner)))
        horizon = self.policy.horizon(idle.terms)
        if horizon is not None and not idle.vetoes:
            opened = self._open[sandbox] = _Open(idle=idle, threshold=plan.pause_after)
            self._number += 1
            heapq.heappush(self._due, (idle.began + horizon, self._number, opened))
        return plan

    def turn_started(self, sandbox: str, now: float, *, lead: float = 0.0) -> None:
        """It is over at `now`, in seconds since the epoch; `lead` as in `Period`."""
        self.advance(now)
        opened = self._open.pop(sandbox, None)
        if opened is not None:
            opened.gap, opened.lead = max(0.0, now - opened.idle.began), lead

    def advance(self, now: float) -> None:
        """Let all periods enter whose horizon is reached."""
        while self._due and self._due[0][0] <= now:
            _, _, opened = heapq.heappop(self._due)
            terms, owner = opened.idle.terms, opened.idle.owner
            key = terms.key
            period = Period(gap=opened.gap, lead=opened.lead, threshold=opened.threshold)
            delta = self.policy.learn(period, terms)
            self._pools[key] = self._pools.get(key, _NONE) + delta
            self._owners[key, owner] = self._owners.get((key, owner), _NONE) + delta

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
