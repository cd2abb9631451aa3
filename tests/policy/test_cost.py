"""What an idle period costs is what the cost model says, to the digit that is printed of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.policy.cost import GRID, THAW, Terms, measured
from sandbox_tools.policy.pause import seen

SIZES = {
    0.5: (3.03e-5, 2, (3, 36, 334), 3.98, 3),
    1: (3.25e-5, 4, (5, 36, 313), 5.9, 5),
    2: (3.70e-5, 8, (9, 36, 279), 9.7, 9),
    8: (6.40e-5, 32, (33, 49, 189), 28.4, 33),
}
"""Of 2 vCPU and so many GiB: rate, pause, break-even for waiting at 0, 0.001 and 0.01 $/s, worst ratio at 0.01, and
break-even where the resume is not seen."""


@pytest.mark.parametrize("gib", SIZES)
def test_rates_break_even_and_worst_ratio_are_those_of_the_published_prices(gib: float) -> None:
    rate, pause, break_even, worst, unseen = SIZES[gib]
    for wait_price, expected in zip((0, 0.001, 0.01), break_even, strict=True):
        terms = Terms.of(vcpu=2, gib=gib, wait_price=wait_price, early_resume=False)
        assert round(terms.break_even(terms.resume_seconds)) == expected
    # The table prints what its author had cut, not rounded, in one place: 3.025e-5.
    assert terms.running == pytest.approx(rate, rel=2e-3)
    assert terms.pause_seconds == pause
    assert terms.worst_ratio(1, pause + 1) == pytest.approx(worst, abs=0.05)
    early = Terms.of(vcpu=2, gib=gib)
    assert round(early.break_even(seen(early))) == unseen


CLOUD = Terms(running=1.0, pause_seconds=4, resume_seconds=1, wait_price=10, early_resume=False)


@pytest.mark.parametrize(
    ("gap", "money", "wait"),
    [(0, 0, 0), (10, 10, 0), (10.5, 15, 4.5), (13.9, 15, 1.1), (14, 15, 1), (1e6, 15, 1), (math.inf, 14, 0)],
)
def test_a_period_costs_its_idling_its_pause_and_its_waiting(gap: float, money: float, wait: float) -> None:
    assert CLOUD.outcome(10, gap) == pytest.approx((money, wait))
    assert CLOUD.cost(10, gap) == pytest.approx(money + 10 * wait)


def test_waiting_while_the_model_thinks_costs_nothing_only_where_the_resume_begins_early() -> None:
    early = Terms(running=1.0, pause_seconds=4, resume_seconds=1, wait_price=10)
    assert early.cost(10, 12, lead=100) == early.outcome(10, 12)[0]
    assert early.cost(10, 12, lead=1) == pytest.approx(15 + 10 * 2)
    assert early.cost(10, 20, lead=math.inf) == 15
    assert CLOUD.cost(10, 20, lead=math.inf) == 15 + 10


def test_a_frozen_sandbox_costs_its_ram_and_a_message_breaks_its_pause_off() -> None:
    local = Terms.of(vcpu=2, gib=1, can_freeze=True, abortable=True, early_resume=False)
    assert local.frozen == pytest.approx(4.5e-6)
    assert local.outcome(10, 5) == (pytest.approx(5 * 4.5e-6), THAW)
    assert local.outcome(10, 12) == (pytest.approx(12 * 4.5e-6), THAW)
    assert local.worst_ratio(1, 5) == 2


@given(
    threshold=st.sampled_from(GRID),
    gap=st.one_of(st.floats(0, 1e5), st.just(math.inf)),
    lead=st.one_of(st.floats(0, 100), st.just(math.inf)),
    gib=st.sampled_from((0.5, 1, 2, 8)),
    early=st.booleans(),
    local=st.booleans(),
)
def test_no_period_costs_less_than_nothing_or_more_than_its_whole_pause_seen(
    threshold: float, gap: float, lead: float, gib: float, early: bool, local: bool
) -> None:
    terms = Terms.of(vcpu=2, gib=gib, early_resume=early, can_freeze=local, abortable=local)
    cost = terms.cost(threshold, gap, lead)
    assert 0 <= cost
    whole = terms.idling * threshold + terms.pause_price(terms.pause_seconds + terms.resume_seconds)
    assert cost <= whole * (1 + 1e-9) + terms.wait_price * THAW


def test_times_that_are_measured_replace_what_a_vendor_says_by_fifths() -> None:
    assert measured(None, 3.0) == 3.0
    assert measured(3.0, 8.0) == pytest.approx(4.0)


def test_terms_that_differ_have_different_keys_and_nearly_the_same_times_the_same() -> None:
    terms = Terms.of(vcpu=2, gib=1)
    others = [Terms.of(vcpu=4, gib=1), Terms.of(vcpu=2, gib=2), Terms.of(vcpu=2, gib=1, can_freeze=True)]
    others += [Terms.of(vcpu=2, gib=1, early_resume=False), Terms.of(vcpu=2, gib=1, wait_price=0.1)]
    assert len({each.key for each in (terms, *others)}) == 6
    assert Terms.of(vcpu=2, gib=1, pause_seconds=4.01).key == terms.key
