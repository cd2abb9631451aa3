"""The default policy plays what would have cost least, is never much worse than break-even, and can say why."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.adaptive import SHARE, SLACK, AdaptivePause, reach
from sandbox_tools.policy.cost import GRID, Terms
from sandbox_tools.policy.learner import Learner
from sandbox_tools.policy.pause import BreakEven, Idle, Never, PauseAfter, Period, Plan, seen
from sandbox_tools.policy.tally import Tally

EARLY = Terms.of(vcpu=2, gib=1)
BLOCKING = Terms.of(vcpu=2, gib=2, early_resume=False)
LOCAL = Terms.of(vcpu=2, gib=1, can_freeze=True, abortable=True)
ALL = {"early": EARLY, "blocking": BLOCKING, "large": Terms.of(vcpu=2, gib=8, early_resume=False), "local": LOCAL}

Adversary = Callable[[float, int], float]
"""Sees the threshold that was chosen and how many came before, then chooses the gap."""


def idle(terms: Terms = EARLY, began: float = 0.0, owner: str = "ann", vetoes: tuple[str, ...] = ()) -> Idle:
    return Idle(owner=owner, began=began, terms=terms, vetoes=vetoes)


def learned(gaps: Iterable[float], terms: Terms, policy: AdaptivePause) -> Tally:
    return sum((policy.learn(Period(gap=gap), terms) for gap in gaps), Tally())


def played(
    gaps: Sequence[float] | Adversary, count: int, terms: Terms, sandboxes: int = 1
) -> tuple[float, float, float]:
    """What the policy paid in all, what break-even would have, and the dearest single period of both.

    Every turn is over as soon as its sandbox is awake: so most periods are far from their horizon.
    """
    learner, even = Learner(AdaptivePause(min_idle=0, prior=False)), BreakEven(min_idle=0).plan(idle(terms)).pause_after
    assert even is not None
    ends = [(number / sandboxes, number) for number in range(sandboxes)]
    back: list[tuple[float, int, float]] = []
    paid = would = dearest = 0.0
    for number in range(count):
        while not ends or (back and back[0][0] <= ends[0][0]):
            now, sandbox, wait = heapq.heappop(back)
            learner.turn_started(f"{sandbox}", now)
            learner.tool_called(f"{sandbox}", now)
            heapq.heappush(ends, (now + wait, sandbox))
        now, sandbox = heapq.heappop(ends)
        chosen = learner.turn_ended(f"{sandbox}", idle(terms, began=now)).pause_after
        assert chosen is not None
        gap = gaps(chosen, number) if callable(gaps) else gaps[number]
        ours, theirs = terms.cost(chosen, gap), terms.cost(min(even, reach(terms)), gap)
        paid, would, dearest = paid + ours, would + theirs, max(dearest, ours, theirs)
        # Who never comes back makes room for somebody who comes long after.
        heapq.heappush(back, (now + min(gap, 10 * reach(terms)), sandbox, terms.outcome(chosen, gap)[1]))
    return paid, would, dearest


ADVERSARIES: dict[str, Adversary] = {
    "just above": lambda tau, number: tau + 1e-6,
    "just below": lambda tau, number: max(0.0, tau - 1e-6),
    "alternating regimes": lambda tau, number: 1.0 if (number // 40) % 2 else tau + 1e-6,
    "drifting": lambda tau, number: 1.01**number,
    "in the middle of the pause": lambda tau, number: tau + 1.0,
    "never back": lambda tau, number: math.inf,
    "short, then always just above": lambda tau, number: 5.0 if number < 60 else tau + 1e-6,
    "long, then always just above": lambda tau, number: 20_000.0 if number < 60 else tau + 1e-6,
    "long again and again": lambda tau, number: 20_000.0 if number % 50 < 30 else tau + 1e-6,
}


@pytest.mark.parametrize("sandboxes", [1, 8])
@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("terms", ALL.values(), ids=ALL)
def test_whoever_sees_the_threshold_first_can_make_it_cost_no_more_than_the_bound(
    name: str, terms: Terms, sandboxes: int
) -> None:
    """Break-even and a quarter, twenty pauses, and one step for each sandbox whose loss nobody knows yet."""
    paid, would, dearest = played(ADVERSARIES[name], 400, terms, sandboxes)
    assert paid <= (1 + SHARE) * would + SLACK * terms.pause_price(seen(terms)) + sandboxes * dearest


@given(
    gaps=st.lists(st.one_of(st.floats(0, 7200), st.floats(0, 30), st.just(math.inf)), min_size=1, max_size=150),
    terms=st.sampled_from(list(ALL.values())),
    sandboxes=st.integers(1, 3),
)
@settings(max_examples=60)
def test_no_sequence_of_gaps_makes_it_cost_more_than_the_bound(gaps: list[float], terms: Terms, sandboxes: int) -> None:
    paid, would, dearest = played(gaps, len(gaps), terms, sandboxes)
    assert paid <= (1 + SHARE) * would + SLACK * terms.pause_price(seen(terms)) + sandboxes * dearest


def test_a_period_is_learned_from_when_its_horizon_is_reached_and_not_when_it_is_over() -> None:
    """Short gaps end first: whoever counts them then takes all for short."""
    policy = AdaptivePause(min_idle=0, prior=False)
    learner, horizon = Learner(policy), policy.horizon(BLOCKING)
    assert horizon is not None
    learner.turn_ended("short", idle(BLOCKING, began=0))
    learner.turn_ended("long", idle(BLOCKING, began=0))
    learner.turn_started("short", 1.0)
    learner.tool_called("short", 2.0)
    learner.advance(horizon - 1)
    (saved,) = learner.snapshot().values()
    assert Tally.from_bytes(saved[""]).count == 0
    learner.advance(horizon)
    (saved,) = learner.snapshot().values()
    assert Tally.from_bytes(saved[""]).count == 2


def test_what_a_period_cost_counts_when_it_is_over_and_once() -> None:
    policy = AdaptivePause(min_idle=0, prior=False)
    for ended in (True, False):
        learner = Learner(policy)
        learner.turn_ended("s", idle(BLOCKING, began=0))
        learner.turn_started("s", 50.0)
        if ended:
            learner.tool_called("s", 51.0)
            (saved,) = learner.snapshot().values()
            assert Tally.from_bytes(saved[""]).played == pytest.approx(50 * BLOCKING.running)
        learner.advance(1e6)
        (saved,) = learner.snapshot().values()
        assert Tally.from_bytes(saved[""]).played == pytest.approx(50 * BLOCKING.running)


def test_a_turn_without_a_tool_never_needed_its_sandbox() -> None:
    """Seen at the end of that turn, and at the horizon where the turn takes longer."""
    policy = AdaptivePause(min_idle=0, prior=False)
    for later in (60.0, 1e6):
        learner = Learner(policy)
        learner.turn_ended("s", idle(EARLY, began=0))
        learner.turn_started("s", 30.0)
        learner.turn_ended("s", idle(EARLY, began=later))
        learner.advance(130)
        (saved,) = learner.snapshot().values()
        at_once = Tally.from_bytes(saved[""]).costs[0]
        assert at_once == pytest.approx(EARLY.running * (EARLY.pause_seconds + EARLY.resume_seconds))


def test_what_comes_after_the_horizon_teaches_nothing_however_late_it_is_learned() -> None:
    policy = AdaptivePause()
    late, never = (policy.learn(Period(gap=gap), BLOCKING) for gap in (reach(BLOCKING) + 60, math.inf))
    assert late.costs == never.costs


def test_an_idle_period_that_is_asked_about_again_is_evidence_once() -> None:
    learner = Learner(AdaptivePause())
    learner.turn_ended("s", idle(began=0))
    learner.turn_ended("s", idle(began=0))
    learner.advance(1e6)
    (saved,) = learner.snapshot().values()
    assert Tally.from_bytes(saved[""]).count == 1


def test_measured_times_move_neither_the_horizon_nor_the_grid_of_what_is_gathered_together() -> None:
    near = Terms.of(vcpu=2, gib=1, pause_seconds=4.1, resume_seconds=1.05)
    policy = AdaptivePause()
    assert near.key == EARLY.key
    assert near.rounded() == EARLY.rounded()
    assert policy.horizon(near) == policy.horizon(EARLY)


def test_with_little_known_it_breaks_even_and_then_plays_what_was_cheapest() -> None:
    policy = AdaptivePause(min_idle=0, prior=False)
    even = BLOCKING.break_even(BLOCKING.resume_seconds)
    assert policy.plan(idle(BLOCKING)).pause_after == pytest.approx(even)
    assert policy.plan(idle(BLOCKING), learned([20.0] * 29, BLOCKING, policy)).pause_after == pytest.approx(even)
    enough = policy.plan(idle(BLOCKING), learned([20.0] * 40, BLOCKING, policy)).pause_after
    assert enough is not None
    assert 20 <= enough < 25
    gone = policy.plan(idle(BLOCKING), learned([math.inf] * 40, BLOCKING, policy))
    assert gone.pause_after == 0
    assert gone.expected_cost == pytest.approx(BLOCKING.idling * BLOCKING.pause_seconds)
    assert "40 idle periods" in gone.reason


def test_an_owner_who_differs_is_learned_about_beside_the_others() -> None:
    policy = AdaptivePause(min_idle=0, prior=False)
    pool, own = learned([math.inf] * 1000, BLOCKING, policy), learned([60.0] * 100, BLOCKING, policy)
    alone = policy.plan(idle(BLOCKING), pool + own).pause_after
    known = policy.plan(idle(BLOCKING), pool + own, own).pause_after
    assert alone == 0
    assert known is not None
    assert known >= 60


def test_the_shipped_prior_pauses_soon_where_the_resume_is_not_seen_and_later_where_it_is() -> None:
    soon = AdaptivePause().plan(idle(EARLY)).pause_after
    later = AdaptivePause().plan(idle(BLOCKING)).pause_after
    assert soon == 2.0  # `min_idle`
    assert later is not None
    assert 60 < later < reach(BLOCKING)


def test_when_the_budget_is_lost_break_even_counts() -> None:
    policy = AdaptivePause(min_idle=0, prior=False)
    price = EARLY.pause_price(seen(EARLY))
    tally = learned([math.inf] * 40, EARLY, policy)
    spent = Tally(count=0, played=tally.broken_even * (1 + SHARE) + (SLACK + 1) * price, broken_even=0)
    plan = policy.plan(idle(EARLY), tally + spent)
    assert plan.pause_after == pytest.approx(EARLY.break_even(seen(EARLY)))
    assert "lost" in plan.reason


def test_a_sandbox_that_can_freeze_does_so_first_and_is_paused_when_its_ram_has_cost_a_pause() -> None:
    plan = AdaptivePause(prior=False).plan(idle(LOCAL))
    assert plan.freeze_after == 2.0
    assert plan.pause_after == pytest.approx(LOCAL.break_even(seen(LOCAL)))
    assert LOCAL.break_even(seen(LOCAL)) > EARLY.break_even(seen(EARLY))
    assert AdaptivePause().plan(idle(EARLY)).freeze_after is None


def test_ram_that_costs_nothing_is_kept_for_an_hour_at_most() -> None:
    free = Terms(running=1e-5, frozen=0.0)
    for policy in (AdaptivePause(prior=False), BreakEven()):
        assert policy.plan(idle(free)).pause_after == 3600


@pytest.mark.parametrize(
    "policy", [PauseAfter(0), Never(), BreakEven(), AdaptivePause(), AdaptivePause(prior=False)], ids=repr
)
def test_nothing_is_planned_while_something_keeps_it_awake_and_the_reason_says_what(policy: AdaptivePause) -> None:
    plan = policy.plan(idle(LOCAL, vetoes=("a command runs", "a port is open")))
    assert plan == Plan(freeze_after=None, pause_after=None, reason="kept awake: a command runs, a port is open")


@pytest.mark.parametrize("policy", [PauseAfter(7), BreakEven(), AdaptivePause()], ids=repr)
def test_the_same_question_has_the_same_answer_with_a_reason_and_a_cost(policy: AdaptivePause) -> None:
    plan = policy.plan(idle())
    assert plan == policy.plan(idle())
    assert plan.reason
    assert plan.expected_cost is not None
    assert plan.expected_cost > 0


@given(
    gaps=st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 100)), max_size=20),
    cut=st.integers(0, 20),
    terms=st.sampled_from(list(ALL.values())),
)
def test_tallies_add_up_and_travel_as_less_than_a_kibibyte(
    gaps: list[tuple[float, float]], cut: int, terms: Terms
) -> None:
    policy = AdaptivePause()
    deltas = [policy.learn(Period(gap=gap, lead=lead, threshold=3.0), terms) for gap, lead in gaps]
    whole = sum(deltas, Tally())
    parts = sum(deltas[cut:], Tally()) + sum(deltas[:cut], Tally())
    assert parts.count == whole.count == len(gaps)
    assert list(parts.costs) == pytest.approx(list(whole.costs))
    data = whole.to_bytes()
    assert len(data) <= 1024
    back = Tally.from_bytes(data)
    assert (back.count, back.played, back.broken_even) == (whole.count, whole.played, whole.broken_even)
    assert list(back.costs) == list(whole.costs)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x02" + bytes(900), Tally().to_bytes() + b"x"])
def test_what_another_version_left_is_forgotten_not_misread(data: bytes) -> None:
    assert Tally.from_bytes(data) == Tally()


def test_a_snapshot_goes_on_where_it_was_taken() -> None:
    learner = Learner(AdaptivePause(min_idle=0, prior=False))
    for number in range(50):
        learner.turn_ended("s", idle(BLOCKING, began=number * 10_000.0))
        learner.turn_started("s", number * 10_000.0 + 20)
        learner.tool_called("s", number * 10_000.0 + 21)
    learner.advance(1e9)
    again = Learner(AdaptivePause(min_idle=0, prior=False))
    again.restore(learner.snapshot())
    assert again.turn_ended("s", idle(BLOCKING, began=1e9)) == learner.turn_ended("s", idle(BLOCKING, began=1e9))


def test_the_grid_is_zero_and_ninety_steps_to_an_hour() -> None:
    assert len(GRID) == 91
    assert (GRID[0], GRID[1]) == (0.0, 1.0)
    assert GRID[-1] == pytest.approx(3600)
    factors = [after / before for before, after in pairwise(GRID[1:])]
    assert factors == pytest.approx([factors[0]] * 89)


def test_a_minimum_that_can_not_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_idle"):
        AdaptivePause(min_idle=-1)
