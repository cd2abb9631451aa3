"""What a sandbox did adds up to its time, and what it cost to the provider's prices."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy import report
from sandbox_tools.policy.savings import TIMER, Account, Change, State, grouped, total

RATE, FROZEN = 3e-5, 4e-6


def change(at: float, state: State, idle_since: float | None = None, waited: float = 0.0) -> Change:
    since = at if idle_since is None else idle_since
    return Change(at=at, state=state, idle_since=since, running=RATE, frozen=FROZEN, waited=waited)


def after(*changes: Change) -> Account:
    account = Account()
    for each in changes:
        account = account.after(each)
    return account


def test_a_sandbox_that_is_frozen_then_paused_then_wakes_has_paid_for_each_by_its_price() -> None:
    """It runs for 100 s, the last 10 of them idle; is frozen for 50, paused for 840, and runs again."""
    account = after(
        change(1000, "running"),
        change(1100, "frozen", idle_since=1090),
        change(1150, "paused", idle_since=1090),
        change(1990, "running", idle_since=1090, waited=0.5),
    ).until(2000)
    assert (account.running, account.frozen, account.paused) == (110, 50, 840)
    assert (account.pauses, account.resumes, account.waited) == (1, 1, 0.5)
    assert account.spent == pytest.approx(110 * RATE + 50 * FROZEN)
    assert account.always_on == pytest.approx(1000 * RATE)
    # In use for 90 s, then five minutes of the timer, then 10 s.
    assert account.timer == pytest.approx((90 + TIMER + 10) * RATE)


def test_idle_time_before_a_late_pause_counts_for_the_timer_no_longer_than_the_timer() -> None:
    """Whoever pauses after the timer would have, has saved nothing: it has cost more."""
    account = after(change(0, "running"), change(1000, "paused", idle_since=100)).until(5000)
    assert account.spent == pytest.approx(1000 * RATE)
    assert account.timer == pytest.approx((100 + TIMER) * RATE)


def test_an_idle_period_shorter_than_the_timer_costs_it_all_of_it() -> None:
    account = after(change(0, "running"), change(10, "paused", idle_since=5), change(100, "running"))
    assert account.timer == account.always_on == pytest.approx(100 * RATE)


def test_a_use_after_a_long_idle_time_in_which_it_ran_tells_what_the_timer_would_have_done() -> None:
    account = after(change(0, "running"), change(1000, "running", idle_since=100)).until(1010)
    assert account.running == 1010
    assert account.resumes == 0
    assert account.timer == pytest.approx((100 + TIMER + 10) * RATE)


def test_a_sandbox_that_ended_costs_nothing_any_more() -> None:
    for end in ("killed", "lost"):
        account = after(change(0, "running"), change(10, end))  # type: ignore[arg-type]
        assert account.until(1e6).always_on == pytest.approx(10 * RATE)


def test_nothing_on_record_is_nothing() -> None:
    assert Account().until(1e9).spent == 0
    assert total([]) == Account()


steps = st.lists(
    st.tuples(st.floats(0, 5000), st.sampled_from(["running", "frozen", "paused"]), st.floats(0, 1)), min_size=1
)


@given(steps, st.floats(0, 5000))
def test_every_second_is_counted_once_and_no_way_to_pay_costs_more_than_always_on(
    moves: list[tuple[float, State, float]], rest: float
) -> None:
    now, changes = 1e6, [change(1e6, "running")]
    for seconds, state, part in moves:
        changes.append(change(now + seconds, state, idle_since=now + part * seconds))
        now += seconds
    account = after(*changes).until(now + rest)
    assert account.running + account.frozen + account.paused == pytest.approx(now + rest - 1e6, abs=1e-3)
    assert account.spent <= account.always_on * (1 + 1e-9)
    assert account.timer <= account.always_on * (1 + 1e-9)


@given(steps, st.floats(-1000, 0))
def test_a_clock_set_back_takes_nothing_away(moves: list[tuple[float, State, float]], back: float) -> None:
    account = after(change(1e6, "running"))
    for seconds, state, _ in moves:
        later = account.after(change(1e6 + seconds + back, state))
        assert later.always_on >= account.always_on
        account = later


LEDGER = [
    ("h1", "ann", "t1", after(change(0, "running"), change(100, "paused", 50))),
    ("h2", "ann", "t1", after(change(0, "running"))),
    ("h3", "ann", "t2", after(change(0, "running"))),
    ("h4", "bob", "t1", after(change(0, "running"), change(10, "frozen", 5))),
]


def test_sandboxes_add_up_to_threads_and_owners() -> None:
    everything = total(grouped(LEDGER, "sandbox", 1000).values())
    assert everything.running == 2110
    for by, groups in (("sandbox", 4), ("thread", 3), ("owner", 2)):
        sums = grouped(LEDGER, by, 1000)  # type: ignore[arg-type]
        assert len(sums) == groups
        assert total(sums.values()).spent == pytest.approx(everything.spent)
    assert set(grouped(LEDGER, "thread", 0)) == {("ann", "t1"), ("ann", "t2"), ("bob", "t1")}


def test_the_table_has_a_line_for_each_and_one_for_all() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table(grouped(LEDGER, "owner", 1000)))
    text = console.export_text()
    _, below = text.split("───", 1)[1].split("\n", 1)
    assert [line.split()[0] for line in below.splitlines() if line.strip()] == ["ann", "bob", "all"]
    assert "35.2 min" in text


def test_the_plot_is_a_png_however_many_there_are(tmp_path: Path) -> None:
    many = {(f"owner {number}",): after(change(0, "running")).until(number) for number in range(40)}
    for groups in (grouped(LEDGER, "thread", 1000), many, {}):
        path = tmp_path / "savings.png"
        report.draw(groups, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_can_not_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "x.png", tmp_path / "x.nonsense"):
        with pytest.raises(ConfigError, match="Cannot write the plot"):
            report.draw({}, path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (59.9, "59.9 s"), (90, "1.5 min"), (3600, "1.0 h"), (2e5, "2.3 d")]
)
def test_times_are_told_in_their_largest_unit(seconds: float, text: str) -> None:
    assert report.span(seconds) == text


def test_what_was_never_paused_has_saved_nothing() -> None:
    assert report.saved(2.0, 2.0) == "0.0%"
    assert report.saved(0.0, 0.0) == "-"
    assert not math.isnan(total([]).spent)
