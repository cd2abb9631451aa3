"""The policies that go by a rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.pause import BreakEven, Idle, Never, PauseAfter, Period
from sandbox_tools.policy.tally import Tally

TERMS = Terms.of(vcpu=2, gib=1)


def idle(began: float = 0.0) -> Idle:
    return Idle(owner="ann", began=began, terms=TERMS)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_fixed_time_counts_from_the_beginning_of_the_idle_period(seconds: float, began: float) -> None:
    assert PauseAfter(seconds).plan(idle(began)).pause_after == seconds


def test_never_is_never() -> None:
    assert Never().plan(idle()).pause_after is None


def test_break_even_pauses_when_idling_has_cost_a_pause_and_a_resume() -> None:
    assert BreakEven(min_idle=0).plan(idle()).pause_after == pytest.approx(5.0)
    assert BreakEven(min_idle=7).plan(idle()).pause_after == 7


@pytest.mark.parametrize("policy", [PauseAfter(1), Never(), BreakEven()], ids=repr)
def test_a_rule_learns_nothing(policy: PauseAfter) -> None:
    assert policy.horizon(TERMS) is None
    assert policy.learn(Period(gap=1.0), TERMS) == policy.price(Period(gap=1.0), TERMS) == Tally()


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan")])
def test_a_limit_that_makes_no_sense_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError):
        PauseAfter(wrong)
