"""A policy is a pure function of the idle time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.pause import Activity, Never, PauseAfter

seconds = st.floats(0, 1e6)


@given(seconds, seconds, seconds)
def test_what_is_left_and_what_has_passed_make_up_the_whole(limit, began, passed):
    decision = PauseAfter(limit).decide(Activity(idle_since=began), began + passed)
    assert decision.pause_after == pytest.approx(max(0, limit - passed), abs=1e-6)


@given(seconds)
def test_zero_pauses_at_once(now):
    assert PauseAfter(0).decide(Activity(idle_since=now), now).pause_after == 0


@given(seconds)
def test_a_clock_set_back_does_not_make_the_sandbox_wait_for_ever(now):
    """An idle time in the future counts from there; it never adds up to more than it and the limit."""
    assert PauseAfter(30).decide(Activity(idle_since=now + 100), now).pause_after <= 130 + 1e-6


def test_never_is_never():
    assert Never().decide(Activity(idle_since=0), 1e9).pause_after is None


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan")])
def test_a_limit_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError):
        PauseAfter(wrong)
