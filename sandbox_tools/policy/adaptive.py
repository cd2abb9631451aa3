"""The default policy: the threshold that would have cost least so far, for this owner and for all."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from operator import add

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.cost import GRID, Terms
from sandbox_tools.policy.pause import LONGEST, Idle, Period, Plan, planned, seen, vetoed
from sandbox_tools.policy.prior import PERIODS
from sandbox_tools.policy.tally import Tally

KAPPA = 30.0
"""As how many periods of an owner's own the mean of all counts."""

ENOUGH = 30
"""Periods from which on the statistics are believed; and as how many the shipped ones count."""

SLACK, SHARE = 20.0, 0.25
"""The budget: how many pauses, and which share of what `BreakEven` would have cost, learning may lose."""


class AdaptivePause:
    """Learns from all owners' idle periods, and from each owner's more the more there are.

    After an idle period the cost of every threshold is known, played or not. The one that would have cost least is
    played, while it has not lost more against `BreakEven` than a budget: so it never costs more in all than 1.25 times
    that, 20 pauses, and one period of each sandbox that is idle just then (after Purohit, Svitkina and Kumar,
    "Improving online algorithms via ML predictions", 2018).

    Above about 2.5 GiB on a cloud, where a pause takes 4 s for each GiB and makes whoever comes meanwhile wait for it,
    that waiting is dearer than all else: it then learns long thresholds by itself. Give a fixed one (`PauseAfter`) of
    ten minutes or more there if few periods are to be expected, or keep such sandboxes smaller.

    Args:
        min_idle: Seconds before which nothing is paused, so that an automatic continuation finds it awake.
        prior: Whether it begins with what was learned from published traces of coding agents. False: with
            `BreakEven`, until 30 periods are known.

    Raises:
        ConfigError: `min_idle` is negative or not finite.
    """

    def __init__(self, *, min_idle: float = 2.0, prior: bool = True) -> None:
        if not 0 <= min_idle < math.inf:
            msg = f"`min_idle` is {min_idle!r}. Pass 0 or more seconds."
            raise ConfigError(msg)
        self.min_idle = min_idle
        self.prior = prior

    def plan(self, idle: Idle, pool: Tally | None = None, own: Tally | None = None) -> Plan:
        """When a pause costs least on average."""
        if veto := vetoed(idle):
            return veto

        terms = idle.terms
        known = pool or Tally()
        break_even = min(terms.break_even(seen(terms)), reach(terms))
        lost = known.played - known.broken_even
        if lost > SLACK * terms.pause_price(seen(terms)) + SHARE * known.broken_even:
            reason = f"what was learned has lost ${lost:.2g} so far, so the break-even of {break_even:.3g} s counts"
            return planned(terms, max(self.min_idle, break_even), reason, self.min_idle)

        if self.prior:
            known = prior(terms.rounded()) + known
        if known.count < ENOUGH:
            reason = f"too little is known, so the break-even of {break_even:.3g} s counts"
            return planned(terms, max(self.min_idle, break_even), reason, self.min_idle)

        threshold, mean = cheapest(known, own or Tally(), self.min_idle, reach(terms))
        count = own.count if own else 0
        reason = f"cheapest on average of {known.count} idle periods, {count} of them this owner's"
        return planned(terms, threshold, reason, self.min_idle, expected=mean)

    def horizon(self, terms: Terms) -> float | None:
        """The longest threshold there is to learn about, and what a pause after it would take."""
        rounded = terms.rounded()
        return reach(terms) + rounded.pause_seconds + rounded.resume_seconds

    def price(self, period: Period, terms: Terms) -> Tally:
        """What it cost, and what `BreakEven` would have."""
        even = max(self.min_idle, min(terms.break_even(seen(terms)), reach(terms)))
        broken_even = terms.cost(even, period.gap, period.lead)
        threshold = period.threshold
        played = broken_even if threshold is None else terms.cost(threshold, period.gap, period.lead)
        return Tally(played=played, broken_even=broken_even)

    def learn(self, period: Period, terms: Terms) -> Tally:
        """What every threshold would have cost in it."""
        # Beyond, all thresholds that could be played would have paused it long before.
        gap = period.gap if period.gap <= reach(terms) + terms.pause_seconds else math.inf
        costs = Tally(count=1, costs=[terms.cost(threshold, gap, period.lead) for threshold in GRID])
        return costs if period.priced else costs + self.price(period, terms)

    def __repr__(self) -> str:
        return f"AdaptivePause(min_idle={self.min_idle!r}, prior={self.prior!r})"


def reach(terms: Terms) -> float:
    """The longest threshold that is looked at, in seconds: three times the break-even, from 2 minutes to an hour."""
    terms = terms.rounded()
    return min(max(3 * terms.break_even(seen(terms)), 120.0), LONGEST)


@lru_cache
def prior(terms: Terms) -> Tally:
    """What the traces that come with the package teach, as `ENOUGH` periods."""
    costs = [[terms.cost(threshold, gap, lead) for threshold in GRID] for gap, lead in PERIODS]
    weight = ENOUGH / len(PERIODS)
    return Tally(count=ENOUGH, costs=[weight * sum(column) for column in zip(*costs, strict=True)])


def cheapest(pool: Tally, own: Tally, shortest: float, longest: float) -> tuple[float, float]:
    """The threshold of least mean cost within these bounds, in seconds, and that cost in dollars.

    The mean of all counts as `KAPPA` periods of the owner's own.
    """
    weight = KAPPA / pool.count
    sums = [weight * cost for cost in pool.costs]
    if own.count:
        sums = list(map(add, sums, own.costs))
    # `shortest` itself costs about as much as the step of the grid before it.
    first, end = bisect_right(GRID, shortest) - 1, bisect_right(GRID, longest)
    least = min(range(first, max(end, first + 1)), key=sums.__getitem__)
    return max(shortest, GRID[least]), sums[least] / (KAPPA + own.count)
