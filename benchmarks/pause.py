"""What each policy would have cost real users and their providers: published traces, replayed.

Periods begin in the order in which turns end, over all sessions; a policy hears of nothing before it happens. The
best in hindsight knows every gap, and pauses at once or never; the best fixed threshold is chosen in hindsight.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sandbox_tools.policy.adaptive import AdaptivePause
from sandbox_tools.policy.cost import GRID, Terms
from sandbox_tools.policy.learner import Learner
from sandbox_tools.policy.pause import BreakEven, Idle, Never, PauseAfter, PausePolicy

TIMER = 300.0
"""Seconds of the timer that the services' own SDKs set."""

POLICIES: dict[str, Callable[[], PausePolicy]] = {
    "at-once": lambda: PauseAfter(0),
    "timer": lambda: PauseAfter(TIMER),
    "never": Never,
    "break-even": lambda: BreakEven(min_idle=0),
    "adaptive": lambda: AdaptivePause(min_idle=0, prior=False),
    "adaptive-prior": lambda: AdaptivePause(min_idle=0, prior=True),
    "kill": lambda: PauseAfter(TIMER),
}
"""By name; `kill` is E2B's default, which ends the sandbox where the others pause it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """One idle period of a trace."""

    session: str
    owner: str
    began: float
    gap: float
    """inf: nobody came back."""
    lead: float


OBSERVED = 600.0
"""Seconds for which a trace without marks must go on after a session's last turn to say that nobody came back."""


def read(path: Path) -> list[Period]:
    """The idle periods of a trace, in the order in which they begin."""
    sessions: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            sessions.setdefault(row["conv"], []).append(row)

    last = max(float(turn["start_s"]) for turns in sessions.values() for turn in turns)
    periods = []
    for session, turns in sessions.items():
        turns.sort(key=lambda turn: float(turn["start_s"]))
        for turn, after in zip(turns, [*turns[1:], None], strict=True):
            began = float(turn.get("end_s") or turn["end_s_est"])
            unsure = turn["last_gap_censored"] == "1" if "last_gap_censored" in turn else began > last - OBSERVED
            if after is None and unsure:
                continue
            gap = math.inf if after is None else max(0.0, float(after["start_s"]) - began)
            lead = float(after["first_tool_s"]) if after and after.get("first_tool_s") else math.inf
            owner = turn.get("user") or session
            periods.append(Period(session=session, owner=owner, began=began, gap=gap, lead=lead))
    return sorted(periods, key=lambda period: period.began)


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a policy did with a trace: for each period its threshold, and the seconds that each decision took."""

    thresholds: list[float]
    seconds: list[float]


def play(policy: PausePolicy, periods: Sequence[Period], terms: Terms) -> Played:
    """Have a policy go through a trace."""
    learner = Learner(policy)
    # Ends and beginnings in the order of time; what begins at the time at which another ends comes after it.
    events = [(period.began, 1, number) for number, period in enumerate(periods)]
    events += [(period.began + period.gap, 0, number) for number, period in enumerate(periods) if period.gap < math.inf]
    thresholds, seconds = [math.inf] * len(periods), []
    for now, begins, number in sorted(events):
        period = periods[number]
        if not begins:
            learner.turn_started(f"{number}", now, lead=period.lead)
            continue
        idle = Idle(owner=period.owner, began=now, terms=terms)
        learner.advance(now)
        started = time.perf_counter()
        plan = learner.turn_ended(f"{number}", idle)
        seconds.append(time.perf_counter() - started)
        thresholds[number] = math.inf if plan.pause_after is None else plan.pause_after
    return Played(thresholds=thresholds, seconds=seconds)


def cost(terms: Terms, periods: Sequence[Period], thresholds: Sequence[float]) -> float:
    """Dollars in all, waiting included."""
    return sum(
        terms.cost(threshold, period.gap, period.lead)
        for threshold, period in zip(thresholds, periods, strict=True)
        if threshold < math.inf or period.gap < math.inf
    )


def never(terms: Terms, period: Period) -> float:
    """Dollars of a period without a pause; inf where nobody came back."""
    return terms.cost(math.inf, period.gap, period.lead) if period.gap < math.inf else math.inf


def best(terms: Terms, periods: Sequence[Period]) -> float:
    """Dollars of whoever knows each gap."""
    return sum(min(terms.cost(0, period.gap, period.lead), never(terms, period)) for period in periods)


def best_fixed(terms: Terms, periods: Sequence[Period]) -> float:
    """Dollars of the best fixed threshold."""
    return min(cost(terms, periods, [threshold] * len(periods)) for threshold in GRID)


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted or unsorted values, the one below which that share lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def report(name: str, periods: Sequence[Period], terms: Terms) -> dict[str, object]:
    """All figures of one policy on one trace."""
    played = play(POLICIES[name](), periods, terms)
    pairs = list(zip(played.thresholds, periods, strict=True))
    outcomes = [terms.outcome(threshold, period.gap) for threshold, period in pairs]
    visible = [
        terms.waiting(wait, period.lead) / terms.wait_price if terms.wait_price else max(0.0, wait - period.lead)
        for (_, wait), (_, period) in zip(outcomes, pairs, strict=True)
        if period.gap < math.inf
    ]
    usd = sum(money for money, _ in outcomes)
    total, optimum = cost(terms, periods, played.thresholds), best(terms, periods)
    returned = len(visible)
    blocked = sum(threshold < period.gap < threshold + terms.pause_seconds for threshold, period in pairs)
    return {
        "n": len(periods),
        "n_returned": returned,
        "billed_s": usd / terms.running,
        "usd": usd,
        "visible": {
            "mean": statistics.fmean(visible),
            "p50": quantile(visible, 0.5),
            "p95": quantile(visible, 0.95),
            "p99": quantile(visible, 0.99),
            "max": max(visible),
        },
        "blocked_share": blocked / returned,
        "pause_share": sum(threshold < period.gap for threshold, period in pairs) / len(periods),
        "lost": sum(threshold < period.gap < math.inf for threshold, period in pairs) if name == "kill" else 0,
        "J": total,
        "J_opt": optimum,
        "ratio": total / optimum,
        "ratio_to_best_fixed": total / best_fixed(terms, periods),
        "decide_us": {
            "p50": quantile(played.seconds, 0.5) * 1e6,
            "p99": quantile(played.seconds, 0.99) * 1e6,
        },
        "tau": {f"p{share:.0f}": quantile(played.thresholds, share / 100) for share in (10, 50, 90)},
    }


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of what is to be reached on coding_agents.csv (POLICY.md), at $0.01 for a second of waiting."""

    gib: float
    early_resume: bool
    ratio: float
    below_timer: float | None = None
    """Share of the timer's billed seconds that must be saved."""
    visible: tuple[str, float] | None = None
    """A quantile of the waiting that is seen, and the seconds it may have at most."""


TARGETS = (
    Target(gib=0.5, early_resume=True, ratio=1.10, below_timer=0.97, visible=("p99", 0.1)),
    Target(gib=1, early_resume=True, ratio=1.12),
    Target(gib=2, early_resume=True, ratio=2.20, visible=("p95", 0.0)),
    Target(gib=0.5, early_resume=False, ratio=1.73, below_timer=0.35),
    Target(gib=2, early_resume=False, ratio=1.88),
    Target(gib=8, early_resume=False, ratio=2.60),
)

LOCAL_RATIO, LOCAL_SIZES = 1.10, (0.5, 2.0, 8.0)
"""The frozen stage: at most so much of the best fixed threshold's cost, for sandboxes of so many GiB."""


def terms_of(gib: float, vcpu: float, wait_price: float, early_resume: bool, engine: str) -> Terms:
    """Of a sandbox in a cloud, or on the local engine, which freezes and breaks off pauses."""
    local = engine == "local"
    return Terms.of(
        gib=gib, vcpu=vcpu, wait_price=wait_price, early_resume=early_resume, can_freeze=local, abortable=local
    )


def check(periods: Sequence[Period], console: Console) -> bool:
    """Print what was to be reached and whether it is."""
    table = Table(title="to reach, on this trace", title_justify="left")
    columns = (
        "scenario",
        "timer",
        "break-even",
        "best fixed",
        "adaptive",
        "at most",
        "billed, s a turn",
        "seen p95",
        "p99",
        "",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "scenario" else "right", no_wrap=True)
    all_reached = True
    for target in TARGETS:
        terms = terms_of(target.gib, 2, 0.01, target.early_resume, "cloud")
        timer, even, ours = (report(name, periods, terms) for name in ("timer", "break-even", "adaptive"))
        fixed = best_fixed(terms, periods) / best(terms, periods)
        saved = 1 - float(str(ours["billed_s"])) / float(str(timer["billed_s"]))
        seen, timers = dict(ours["visible"]), dict(timer["visible"])  # type: ignore[call-overload]
        reached = float(str(ours["ratio"])) <= target.ratio
        if target.below_timer is not None:
            reached &= saved >= target.below_timer
        if target.visible is not None:
            reached &= seen[target.visible[0]] <= target.visible[1]
        elif target.below_timer is not None:
            reached &= seen["p95"] <= timers["p95"] and seen["p99"] <= timers["p99"]
        all_reached &= reached
        table.add_row(
            f"{target.gib:g} GiB, {'early resume' if target.early_resume else 'no early resume'}",
            *(f"{row['ratio']:.2f}" for row in (timer, even)),
            f"{fixed:.2f}",
            f"{ours['ratio']:.3f}",
            f"{target.ratio:.2f}",
            f"{float(str(ours['billed_s'])) / len(periods):.1f} ({saved:.1%} below the timer)",
            f"{seen['p95']:.2f}",
            f"{seen['p99']:.2f}",
            "reached" if reached else "MISSED",
        )
    for gib in LOCAL_SIZES:
        ours = report("adaptive", periods, terms_of(gib, 2, 0.01, True, "local"))
        reached = float(str(ours["ratio_to_best_fixed"])) <= LOCAL_RATIO
        all_reached &= reached
        label = f"{gib:g} GiB, frozen first: to best fixed"
        table.add_row(
            label,
            "",
            "",
            "1",
            f"{ours['ratio_to_best_fixed']:.3f}",
            f"{LOCAL_RATIO:.2f}",
            "",
            "",
            "",
            "reached" if reached else "MISSED",
        )
    console.print(table)
    return all_reached


def plot(traces: dict[str, Sequence[Period]], terms: Terms, path: Path) -> None:
    """Draw what each policy costs against what its users wait, on each trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(traces), figsize=(6 * len(traces), 4.5), squeeze=False)
    for panel, (name, periods) in zip(panels[0], traces.items(), strict=True):
        returned = sum(period.gap < math.inf for period in periods)

        def point(
            thresholds: Sequence[float], periods: Sequence[Period] = periods, returned: int = returned
        ) -> tuple[float, float]:
            pairs = list(zip(thresholds, periods, strict=True))
            usd = sum(terms.outcome(threshold, period.gap)[0] for threshold, period in pairs)
            wait = sum(
                max(0.0, terms.outcome(threshold, period.gap)[1] - (period.lead if terms.early_resume else 0.0))
                for threshold, period in pairs
                if period.gap < math.inf
            )
            return wait / returned, 1000 * usd / len(periods)

        curve = [point([threshold] * len(periods)) for threshold in GRID]
        panel.plot(*zip(*curve, strict=True), color="0.7", label="any fixed threshold")
        for policy in ("at-once", "timer", "break-even", "adaptive"):
            x, y = point(play(POLICIES[policy](), periods, terms).thresholds)
            panel.plot([x], [y], "o", label=policy)
        panel.set_title(name)
        panel.set_xlabel("seconds a returning user waits and sees, mean")
        panel.set_ylabel("$ for 1000 idle periods")
        panel.set_yscale("log")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR", help="where the traces (*.csv) are")
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--vcpu", type=float, default=2)
    parser.add_argument("--wait-price", type=float, default=0.01, help="dollars for a second of waiting")
    parser.add_argument(
        "--prefetch", type=int, choices=(0, 1), default=1, help="whether a resume begins at the message"
    )
    parser.add_argument("--engine", choices=("cloud", "local"), default="cloud")
    parser.add_argument("--policy", choices=sorted(POLICIES), help="only this one (default: all, and what to reach)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("--png", type=Path, metavar="OUT", help="draw cost against waiting here")
    arguments = parser.parse_args()
    console = Console(file=sys.stdout)
    traces = {path.stem: read(path) for path in sorted(arguments.traces.glob("*.csv"))}
    terms = terms_of(arguments.gib, arguments.vcpu, arguments.wait_price, bool(arguments.prefetch), arguments.engine)
    names = [arguments.policy] if arguments.policy else list(POLICIES)
    results = {trace: {name: report(name, periods, terms) for name in names} for trace, periods in traces.items()}
    for trace, rows in results.items():
        show(trace, rows, console)
    reached = True
    if arguments.policy is None and "coding_agents" in traces:
        reached = check(traces["coding_agents"], console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.png:
        plot(traces, terms, arguments.png)
    return 0 if reached else 1


def show(trace: str, rows: dict[str, dict[str, object]], console: Console) -> None:
    """Print the figures of each policy on one trace."""
    first = next(iter(rows.values()))
    table = Table(title=f"{trace}: {first['n']} idle periods, {first['n_returned']} returned", title_justify="left")
    for column in (
        "policy",
        "ratio",
        "to best fixed",
        "billed, s a turn",
        "seen mean",
        "p95",
        "p99",
        "paused",
        "blocked",
        "lost",
        "decide, us p50",
        "p99",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, row in rows.items():
        seen, micros = dict(row["visible"]), dict(row["decide_us"])  # type: ignore[call-overload]
        table.add_row(
            name,
            f"{row['ratio']:.2f}",
            f"{row['ratio_to_best_fixed']:.2f}",
            f"{float(str(row['billed_s'])) / int(str(row['n'])):.1f}",
            *(f"{seen[key]:.2f}" for key in ("mean", "p95", "p99")),
            f"{row['pause_share']:.1%}",
            f"{row['blocked_share']:.1%}",
            f"{row['lost']}",
            *(f"{micros[key]:.0f}" for key in ("p50", "p99")),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
