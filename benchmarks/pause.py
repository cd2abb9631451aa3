"""What each policy would have cost real users and their providers: published traces, replayed.

Periods begin in the order in which turns end, over all sessions; a policy hears of nothing before it happens, and
reads no file. The best in hindsight knows every gap, and pauses at once or never; the best fixed threshold is chosen
in hindsight.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sandbox_tools.policy.adaptive import AdaptivePause
from sandbox_tools.policy.cost import GRID, Terms
from sandbox_tools.policy.learner import Learner
from sandbox_tools.policy.pause import BreakEven, Idle, Never, PauseAfter, PausePolicy

TIMER = 300.0
"""Seconds of the timer that the services' own SDKs set."""

OBSERVED = 1200.0
"""Seconds for which a trace must go on after the beginning of a period, where it does not mark what was cut off; who
came back later than that did not come back."""

ARMED = 0.2
"""Seconds after a turn's end at which the server's timer is set to what was planned; until then it has `TIMER`."""

POLICIES: dict[str, Callable[[], PausePolicy]] = {
    "at-once": lambda: PauseAfter(0),
    "timer": lambda: PauseAfter(TIMER),
    "kill": lambda: PauseAfter(TIMER),
    "never": Never,
    "break-even": lambda: BreakEven(min_idle=0),
    "adaptive": lambda: AdaptivePause(min_idle=0, prior=False),
    "adaptive-prior": lambda: AdaptivePause(min_idle=0, prior=True),
}
"""By name; `kill` is E2B's default, which ends the sandbox where the others pause it. The prior was taken from
coding_agents.csv, so that it is no evidence there."""

Figures = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """One idle period of a trace.

    Attributes:
        gap: Seconds until the user came back. inf: never.
        lead: Seconds from then to the first tool call. inf: the turn called none.
    """

    session: str
    owner: str
    began: float
    gap: float
    lead: float


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
            began = _end(turn)
            gap = math.inf if after is None else max(0.0, float(after["start_s"]) - began)
            if "last_gap_censored" not in turn:
                if began > last - OBSERVED:
                    continue
                gap = gap if gap <= OBSERVED else math.inf
            elif after is None and turn["last_gap_censored"] == "1":
                continue
            lead = float(after["first_tool_s"]) if after and after.get("first_tool_s") else math.inf
            owner = turn.get("user") or session
            periods.append(Period(session=session, owner=owner, began=began, gap=gap, lead=lead))
    return sorted(periods, key=lambda period: period.began)


def _end(turn: dict[str, str]) -> float:
    return float(turn.get("end_s") or turn["end_s_est"])


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a policy did with a trace: for each period its threshold, and the seconds that each decision took."""

    thresholds: list[float]
    seconds: list[float]
    state_bytes: int
    """The largest state it kept of an owner, in bytes."""


def play(policy: PausePolicy, periods: Sequence[Period], terms: Terms) -> Played:
    """Have a policy go through a trace."""
    learner = Learner(policy)
    events = []
    for number, period in enumerate(periods):
        events.append((period.began, 2, number))
        if period.gap < math.inf:
            # At one time, a turn that starts comes before one that ends, except the one that follows it without a gap.
            events.append((period.began + period.gap, 0 if period.gap else 3, number))
        if period.gap + period.lead < math.inf:
            events.append((period.began + period.gap + period.lead, 1, number))
    thresholds, seconds = [math.inf] * len(periods), []
    for now, kind, number in sorted(events):
        period = periods[number]
        if kind == 1:
            learner.tool_called(period.session, now)
        elif kind != 2:
            learner.turn_started(period.session, now)
        else:
            learner.advance(now)
            idle = Idle(owner=period.owner, began=now, terms=terms)
            started = time.perf_counter()
            plan = learner.turn_ended(period.session, idle)
            seconds.append(time.perf_counter() - started)
            thresholds[number] = math.inf if plan.pause_after is None else plan.pause_after
    kept = [len(data) for tallies in learner.snapshot().values() for data in tallies.values()]
    return Played(thresholds=thresholds, seconds=seconds, state_bytes=max(kept, default=0))


def best(terms: Terms, periods: Sequence[Period]) -> float:
    """Dollars of whoever knows each gap."""
    return sum(min(terms.cost(tau, period.gap, period.lead) for tau in (0, math.inf)) for period in periods)


def best_fixed(terms: Terms, periods: Sequence[Period]) -> float:
    """Dollars of the best fixed threshold."""
    return min(sum(terms.cost(tau, period.gap, period.lead) for period in periods) for tau in GRID)


def visible(terms: Terms, period: Period, threshold: float) -> float:
    """Seconds that the user waits and sees."""
    return max(0.0, terms.outcome(threshold, period.gap)[1] - (period.lead if terms.early_resume else 0.0))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def figures(name: str, periods: Sequence[Period], terms: Terms) -> Figures:
    """All figures of one policy on one trace."""
    policy = policy_named(name)
    played = play(policy, periods, terms)
    pairs = list(zip(played.thresholds, periods, strict=True))
    usd = sum(terms.outcome(threshold, period.gap)[0] for threshold, period in pairs)
    waits = [visible(terms, period, threshold) for threshold, period in pairs if period.gap < math.inf]
    total, optimum = usd + terms.wait_price * sum(waits), best(terms, periods)
    blocked = sum(threshold < period.gap < threshold + terms.pause_seconds for threshold, period in pairs)
    return {
        "n": len(periods),
        "n_returned": len(waits),
        "billed_s": usd / terms.running,
        "usd": usd,
        "visible": {
            "mean": statistics.fmean(waits),
            **{f"p{share}": quantile(waits, share / 100) for share in (50, 95, 99)},
            "max": max(waits),
        },
        "blocked_share": 0.0 if terms.abortable else blocked / len(waits),
        "pause_share": sum(threshold < period.gap for threshold, period in pairs) / len(periods),
        "lost": _lost(name, periods, played.thresholds),
        "killed": _killed(name, periods, played.thresholds, terms),
        "J": total,
        "J_opt": optimum,
        "ratio": total / optimum,
        "ratio_to_best_fixed": total / best_fixed(terms, periods),
        "decide_us": {f"p{share}": quantile(played.seconds, share / 100) * 1e6 for share in (50, 99)},
        "tau": {f"p{share}": quantile(played.thresholds, share / 100) for share in (10, 50, 90)},
        "state_bytes": played.state_bytes,
    }


def _lost(name: str, periods: Sequence[Period], thresholds: Sequence[float]) -> int:
    """How many users came back to a sandbox that had ended."""
    pairs = zip(thresholds, periods, strict=True)
    return sum(threshold < period.gap < math.inf for threshold, period in pairs) if name == "kill" else 0


def _killed(name: str, periods: Sequence[Period], thresholds: Sequence[float], terms: Terms) -> Figures:
    """The same with the client killed in every period, at a random moment from the turn's end to the threshold.

    What remains is the server's timer, in whole seconds; it has been set to the threshold, or is still that of a turn.
    """
    chance = random.Random(5)
    timers = []
    for threshold in thresholds:
        armed = chance.uniform(0, min(threshold, TIMER)) >= ARMED
        timers.append(float(math.ceil(threshold)) if armed and threshold < math.inf else chance.uniform(0.5, 1) * TIMER)
    usd = sum(terms.outcome(timer, period.gap)[0] for timer, period in zip(timers, periods, strict=True))
    return {"lost": _lost(name, periods, timers), "billed_s": usd / terms.running}


def policy_named(name: str) -> PausePolicy:
    """The policy of that name, or the fixed threshold of `fixed:SECONDS`.

    Raises:
        ValueError: There is none.
    """
    if name.startswith("fixed:"):
        return PauseAfter(float(name.removeprefix("fixed:")))
    if name not in POLICIES:
        raise ValueError(name)
    return POLICIES[name]()


def terms_of(gib: float, vcpu: float, wait_price: float, early_resume: bool, engine: str) -> Terms:
    """Of a sandbox in a cloud, or on the local engine, which freezes and breaks off pauses."""
    local = engine == "local"
    return Terms.of(
        gib=gib, vcpu=vcpu, wait_price=wait_price, early_resume=early_resume, can_freeze=local, abortable=local
    )


def finite(value: object) -> object:
    """The same for JSON, which knows no inf."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(text: str) -> str:
    policy_named(text)
    return text


def main() -> int:
    """0: all figures were asked for and all that is to be reached is, or one policy's were."""
    from benchmarks import pause_report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR", help="where *.csv are, or one of them")
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--vcpu", type=float, default=2)
    parser.add_argument("--wait-price", type=float, default=0.01, help="dollars for a second of waiting")
    parser.add_argument("--prefetch", type=int, choices=(0, 1), default=1, help="1: a resume begins at the message")
    parser.add_argument("--engine", choices=("cloud", "local"), default="cloud")
    names = f"{', '.join(POLICIES)}, fixed:SECONDS (default: all, and what to reach)"
    parser.add_argument("--policy", type=_name, metavar="NAME", help=names)
    json_help = "write the figures here, by trace and policy; without a level where there is one trace, or `--policy`"
    parser.add_argument("--json", type=Path, metavar="OUT", help=json_help)
    parser.add_argument("--png", type=Path, metavar="OUT", help="draw cost against waiting here")
    arguments = parser.parse_args()

    console = Console(file=sys.stdout)
    paths = sorted(arguments.traces.glob("*.csv")) if arguments.traces.is_dir() else [arguments.traces]
    traces = {path.stem: read(path) for path in paths}
    if not traces:
        parser.error(f"there is no *.csv in {arguments.traces}")
    terms = terms_of(arguments.gib, arguments.vcpu, arguments.wait_price, bool(arguments.prefetch), arguments.engine)
    chosen = [arguments.policy] if arguments.policy else list(POLICIES)
    results = {trace: {name: figures(name, periods, terms) for name in chosen} for trace, periods in traces.items()}
    for trace, rows in results.items():
        pause_report.show(trace, rows, console)
    reached = True
    if arguments.policy is None and "coding_agents" in traces:
        reached = pause_report.check(traces["coding_agents"], console)

    if arguments.json:
        by_trace: dict[str, object] = {
            trace: rows[arguments.policy] if arguments.policy else rows for trace, rows in results.items()
        }
        written = by_trace if len(by_trace) > 1 else next(iter(by_trace.values()))
        arguments.json.write_text(json.dumps(finite(written), indent=1))
    if arguments.png:
        pause_report.plot(traces, terms, arguments.png)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
