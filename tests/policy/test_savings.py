"""The savings report adds up what sandboxes did, at the provider's prices, beside what they might have done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.policy.savings import TIMER, Account, Change, total

RUN, FREEZE = 2.0, 0.5


def change(at: float, state: str, idle_since: float | None = None, waited: float = 0.0) -> Change:
    since = at if idle_since is None else idle_since
    return Change(at=at, state=state, idle_since=since, running=RUN, frozen=FREEZE, waited=waited)  # type: ignore[arg-type]


def account(*changes: Change) -> Account:
    state = Account()
    for each in changes:
        state = state.after(each)
    return state


def test_each_state_costs_its_own_rate_until_the_next_begins() -> None:
    done = account(
        change(0, "running"),
        change(10, "frozen", idle_since=8),
        change(30, "paused", idle_since=8),
        change(1000, "running", waited=0.25),
        change(1005, "killed"),
    )
    assert (done.running, done.frozen, done.paused) == (15, 20, 970)
    assert (done.pauses, done.resumes, done.waited) == (1, 1, 0.25)
    assert done.spent == 15 * RUN + 20 * FREEZE
    assert done.always_on == 1005 * RUN
    # Awake for the timer's five minutes from 8 on, asleep until 1000.
    assert done.timer == pytest.approx((8 + TIMER + 5) * RUN)


def test_an_idle_period_shorter_than_the_timer_costs_it_all_of_it() -> None:
    done = account(change(0, "running"), change(10, "paused", idle_since=5), change(100, "running"))
    assert done.timer == 100 * RUN
    assert done.always_on == 100 * RUN


def test_what_still_goes_on_counts_until_now_and_a_killed_one_costs_nothing_more() -> None:
    running = account(change(0, "running"))
    assert running.until(10).spent == 20
    assert running.until(20).spent == 40
    ended = running.after(change(10, "killed"))
    assert ended.until(1e9).spent == 20


def test_a_clock_that_went_back_takes_nothing_away() -> None:
    done = account(change(100, "running"), change(50, "paused"), change(60, "running"))
    assert done.running == 0
    assert done.spent >= 0


times = st.lists(
    st.tuples(st.floats(0, 1000), st.sampled_from(("running", "frozen", "paused"))), min_size=1, max_size=20
)


@given(times)
def test_no_policy_spends_more_than_always_on_and_all_seconds_are_counted(steps: list[tuple[float, str]]) -> None:
    now, done = 0.0, account(change(0, "running"))
    for seconds, state in steps:
        now += seconds
        done = done.after(change(now, state, idle_since=max(0.0, now - 1)))
    assert done.running + done.frozen + done.paused == pytest.approx(now)
    assert done.spent <= done.always_on + 1e-9
    assert done.timer <= done.always_on + 1e-9


def test_sums_are_of_all() -> None:
    one = account(change(0, "running"), change(10, "paused"))
    both = total([one, one])
    assert (both.running, both.pauses, both.spent) == (20, 2, 40)
