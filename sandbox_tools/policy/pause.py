"""Decides when an idle sandbox is frozen and paused: pure functions of what is known; only the sweeper acts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.prior import PERIODS
from sandbox_tools.policy.tally import Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class Idle:
    """An idle period that has just begun, or that is asked about again.

    Attributes:
        owner: Whose sandbox it is.
        began: When its last lease or turn ended, in seconds since the epoch.
        terms: What it costs.
        vetoes: Why it must stay awake for now, each as a clause: a lease held, a command that runs.
    """

    owner: str
    began: float
    terms: Terms
    vetoes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to do with an idle sandbox.

    Attributes:
        freeze_after: Seconds from the beginning of the idle period. None: don't freeze.
        pause_after: The same until the pause; 0: at once. None: don't pause.
        reason: One clause for a log line.
        expected_cost: Dollars of this idle period: on average where that is known, else at most, for one that is
            paused. None: nobody can say.
    """

    freeze_after: float | None
    pause_after: float | None
    reason: str
    expected_cost: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """An idle period of which as much is known as ever will be looked at.

    Attributes:
        gap: Seconds until the next message. inf: none came within the policy's `horizon`.
        lead: Seconds from that message to the first tool call. inf: the turn used no tool. 0: nobody noted it.
        threshold: After how many seconds it was to be paused. None: never.
        priced: Whether a policy's `price` of it has been added already.
    """

    gap: float
    lead: float = 0.0
    threshold: float | None = None
    priced: bool = False


class PausePolicy(Protocol):
    """Answers for one idle period, and says what there is to learn from one."""

    def plan(self, idle: Idle, pool: Tally | None = None, own: Tally | None = None) -> Plan:
        """What to do with it; the same for the same arguments.

        Args:
            pool: What was learned from all owners under these terms. None: nothing.
            own: What was learned from this owner. None: nothing.
        """
        ...

    def horizon(self, terms: Terms) -> float | None:
        """Seconds after the beginning of a period at which `learn` is asked, whether it is over by then or not.

        Whoever asked when it is over would learn from the short ones first, and take all for short. None: never.
        """
        ...

    def price(self, period: Period, terms: Terms) -> Tally:
        """What to add to the pool's tally as soon as a period is over, so that losses are answered for at once.

        Who leaves this out adds it with `learn`: the policy then hears of its losses a horizon late.
        """
        ...

    def learn(self, period: Period, terms: Terms) -> Tally:
        """What to add to both tallies at the horizon."""
        ...


class Unlearning:
    """What policies share that go by a rule and learn nothing."""

    def horizon(self, terms: Terms) -> float | None:
        """Never."""
        return None

    def price(self, period: Period, terms: Terms) -> Tally:
        """Nothing."""
        return Tally()

    def learn(self, period: Period, terms: Terms) -> Tally:
        """Nothing."""
        return Tally()


class PauseAfter(Unlearning):
    """Pauses after a fixed time of idleness.

    Args:
        seconds: Idle seconds until the pause. 0: as soon as the turn ends.

    Raises:
        ConfigError: `seconds` is negative or not finite.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds < math.inf:
            msg = f"`seconds` is {seconds!r}. Pass 0 or more, or use `Never()`."
            raise ConfigError(msg)
        self.seconds = seconds

    def plan(self, idle: Idle, pool: Tally | None = None, own: Tally | None = None) -> Plan:
        """After the fixed time."""
        return vetoed(idle) or planned(idle.terms, self.seconds, f"idle for {self.seconds:g} s")

    def __repr__(self) -> str:
        return f"PauseAfter({self.seconds!r})"


class Never(Unlearning):
    """Asks for no pause; the server's own timeout still pauses a sandbox that nobody uses."""

    def plan(self, idle: Idle, pool: Tally | None = None, own: Tally | None = None) -> Plan:
        """Never."""
        return vetoed(idle) or Plan(freeze_after=None, pause_after=None, reason="the policy is `Never`")

    def __repr__(self) -> str:
        return "Never()"


class BreakEven(Unlearning):
    """Pauses when idling has cost as much as a pause and a resume: at most `Terms.worst_ratio` times the best.

    Args:
        min_idle: Seconds before which nothing is paused, so that an automatic continuation finds it awake.
    """

    def __init__(self, min_idle: float = 2.0) -> None:
        self.min_idle = min_idle

    def plan(self, idle: Idle, pool: Tally | None = None, own: Tally | None = None) -> Plan:
        """At the point of break-even."""
        seconds = max(self.min_idle, min(idle.terms.break_even(seen(idle.terms)), LONGEST))
        reason = f"idling for {seconds:.3g} s costs as much as a pause and a resume"
        return vetoed(idle) or planned(idle.terms, seconds, reason, self.min_idle)

    def __repr__(self) -> str:
        return f"BreakEven(min_idle={self.min_idle!r})"


LONGEST = 3600.0
"""Seconds after which any policy but `Never` pauses: what is merely frozen does not survive the machine."""


@lru_cache
def seen(terms: Terms, wait: float | None = None) -> float:
    """Seconds that a user sees, on average, of a wait; None: of a resume.

    All of it, or what is left where the resume begins with the message: by the traces that come with the package,
    where one turn in a hundred calls its first tool within 3.3 s.
    """
    wait = terms.resume_seconds if wait is None else wait
    if not terms.early_resume:
        return wait
    leads = [lead for gap, lead in PERIODS if gap < math.inf]
    return sum(max(0.0, wait - lead) for lead in leads) / len(leads)


def vetoed(idle: Idle) -> Plan | None:
    """The plan where something keeps it awake. None: nothing does."""
    if not idle.vetoes:
        return None
    return Plan(freeze_after=None, pause_after=None, reason=f"kept awake: {', '.join(idle.vetoes)}")


def planned(
    terms: Terms, pause_after: float, reason: str, freeze_after: float = 0.0, *, expected: float | None = None
) -> Plan:
    """The plan to pause then, and to freeze before where that can be done.

    Args:
        expected: Dollars, on average. None: what it costs at most.
    """
    at_most = terms.cost(pause_after, pause_after + terms.pause_seconds)
    return Plan(
        freeze_after=None if terms.frozen is None else min(freeze_after, pause_after),
        pause_after=pause_after,
        reason=reason,
        expected_cost=at_most if expected is None else expected,
    )
