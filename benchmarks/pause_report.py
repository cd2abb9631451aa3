"""What `benchmarks.pause` found, as tables and as a plot; and what is to be reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.pause import (
    POLICIES,
    Figures,
    Period,
    best,
    best_fixed,
    figures,
    play,
    policy_named,
    terms_of,
    visible,
)
from sandbox_tools.policy.cost import GRID, Terms


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of what is to be reached on coding_agents.csv, at $0.01 for a second of waiting.

    Attributes:
        ratio: To the best in hindsight, at most; on the local engine to the best fixed threshold.
        below_timer: Share of the timer's billed seconds that must be saved.
        seen: A quantile of the waiting that is seen, and the seconds it may have at most. None: the timer's p95, p99.
    """

    gib: float
    early_resume: bool
    ratio: float
    below_timer: float = 0.0
    seen: tuple[str, float] | None = None
    engine: str = "cloud"

    def __str__(self) -> str:
        if self.engine == "local":
            return f"{self.gib:g} GiB, frozen first (to best fixed)"
        return f"{self.gib:g} GiB, {'' if self.early_resume else 'no '}early resume"


TARGETS = (
    Target(gib=0.5, early_resume=True, ratio=1.10, below_timer=0.97, seen=("p99", 0.1)),
    Target(gib=1, early_resume=True, ratio=1.12, seen=("p99", math.inf)),
    Target(gib=2, early_resume=True, ratio=2.20, seen=("p95", 0.0)),
    Target(gib=0.5, early_resume=False, ratio=1.73, below_timer=0.35),
    Target(gib=2, early_resume=False, ratio=1.88, seen=("p99", math.inf)),
    Target(gib=8, early_resume=False, ratio=2.60, seen=("p99", math.inf)),
    *(Target(gib=gib, early_resume=True, ratio=1.10, seen=("p99", math.inf), engine="local") for gib in (0.5, 2, 8)),
)


def check(periods: Sequence[Period], console: Console) -> bool:
    """Print what is to be reached and whether it is."""
    table = Table(title="to reach on coding_agents", title_justify="left")
    for column in ("", "timer", "break-even", "best fixed", "adaptive", "at most", "below timer", "p95", "p99", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    verdicts = []
    for target in TARGETS:
        terms = terms_of(target.gib, 2, 0.01, target.early_resume, target.engine)
        rows: list[dict[str, Any]] = [figures(name, periods, terms) for name in ("timer", "break-even", "adaptive")]
        timer, _, ours = rows
        key = "ratio" if target.engine == "cloud" else "ratio_to_best_fixed"
        saved = 1 - ours["billed_s"] / timer["billed_s"]
        reached = ours[key] <= target.ratio and saved >= target.below_timer
        limits = dict([target.seen]) if target.seen else {each: timer["visible"][each] for each in ("p95", "p99")}
        reached &= all(ours["visible"][each] <= limit for each, limit in limits.items())
        reached &= ours["lost"] == ours["killed"]["lost"] == 0
        verdicts.append(reached)
        table.add_row(
            str(target),
            *(f"{row[key]:.2f}" for row in (timer, rows[1])),
            f"{best_fixed(terms, periods) / best(terms, periods):.2f}" if key == "ratio" else "1",
            f"{ours[key]:.3f}",
            f"{target.ratio:.2f}",
            f"{saved:.1%}",
            *(f"{ours['visible'][each]:.2f}" for each in ("p95", "p99")),
            "reached" if reached else "MISSED",
        )
    console.print(table)
    return all(verdicts)


def show(trace: str, rows: dict[str, Figures], console: Console) -> None:
    """Print the figures of each policy on one trace."""
    first = next(iter(rows.values()))
    title = f"{trace}: {first['n']} idle periods, {first['n_returned']} returned; seconds a turn, of waiting those seen"
    table = Table(title=title, title_justify="left")
    columns = ("policy", "ratio", "to best fixed", "billed", "waiting", "p95", "p99", "tau p50", "paused", "blocked")
    for column in (*columns, "lost", "lost, client killed", "decide us p50", "p99"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, figure in rows.items():
        row: dict[str, Any] = dict(figure)
        table.add_row(
            name,
            f"{row['ratio']:.2f}",
            f"{row['ratio_to_best_fixed']:.2f}",
            f"{row['billed_s'] / row['n']:.1f}",
            *(f"{row['visible'][key]:.2f}" for key in ("mean", "p95", "p99")),
            f"{row['tau']['p50']:.0f}",
            f"{row['pause_share']:.1%}",
            f"{row['blocked_share']:.1%}",
            f"{row['lost']}",
            f"{row['killed']['lost']}",
            *(f"{row['decide_us'][key]:.0f}" for key in ("p50", "p99")),
        )
    console.print(table)


def plot(traces: dict[str, list[Period]], terms: Terms, path: Path) -> None:
    """Draw what each policy costs against what its users wait: a column for each trace, a row for each resume."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [name for name in POLICIES if name not in ("never", "kill")]
    figure, panels = pyplot.subplots(2, len(traces), figsize=(6.5 * len(traces), 9), squeeze=False)
    for row, early in enumerate((True, False)):
        for panel, (trace, periods) in zip(panels[row], traces.items(), strict=True):
            under = replace(terms, early_resume=early)
            curve = [_point(under, periods, [tau] * len(periods)) for tau in GRID]
            panel.plot(*zip(*curve, strict=True), color="0.7", label="any fixed threshold, 0 s to an hour", zorder=1)
            for name, marker in zip(drawn, "v^sD*", strict=True):
                point = _point(under, periods, play(policy_named(name), periods, under).thresholds)
                panel.scatter(*point, marker=marker, s=60, label=name, zorder=2, clip_on=False)
            panel.set_title(f"{trace}, resume at the {'message' if early else 'first tool call'}")
            panel.set_xlabel("seconds a returning user waits and sees, on average")
            panel.set_ylabel("$ for 1000 idle periods")
            panel.set_yscale("log")
            panel.set_xlim(left=0)
            panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _point(terms: Terms, periods: Sequence[Period], thresholds: Sequence[float]) -> tuple[float, float]:
    pairs = list(zip(thresholds, periods, strict=True))
    usd = sum(terms.outcome(threshold, period.gap)[0] for threshold, period in pairs)
    waits = [visible(terms, period, threshold) for threshold, period in pairs if period.gap < math.inf]
    return sum(waits) / len(waits), 1000 * usd / len(periods)
