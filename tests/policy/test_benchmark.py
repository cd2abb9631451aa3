"""The benchmark reads traces as they are described, lets no policy look ahead, and prices what it did."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.pause import OBSERVED, figures, play, policy_named, read, terms_of
from benchmarks.prior import spelt
from sandbox_tools.policy.cost import Terms

REPOSITORY = Path(__file__).parents[2]

COLUMNS = ("conv", "turn", "start_s", "end_s", "first_tool_s", "agent", "user", "last_gap_censored", "source")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 600 turns of 60 sessions in a day, made up: short gaps, long ones, and users who never come back."""
    chance = random.Random(4)
    path = tmp_path_factory.mktemp("traces") / "made_up.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for session in range(60):
            now = chance.uniform(0, 80_000)
            turns = chance.randint(1, 20)
            for turn in range(turns):
                length, tool = chance.uniform(5, 60), f"{chance.uniform(3, 12):.1f}" if chance.random() < 0.8 else ""
                censored = int(session % 10 == 0)
                user = f"u{session % 4}"
                rows.writerow((f"s{session}", turn, now, now + length, tool, "any", user, censored, "made up"))
                now += length + (chance.expovariate(1 / 20) if chance.random() < 0.5 else chance.expovariate(1 / 900))
    return path


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_gaps_leads_and_what_was_cut_off_are_read_as_described(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        ",".join(COLUMNS),
        "a,0,0,10,,x,ann,0,s",
        "a,1,30,40,4.5,x,ann,0,s",
        "a,2,39,50,,x,ann,0,s",
        "b,0,5,20,,x,ann,1,s",
    )
    periods = [(period.session, period.began, period.gap, period.lead) for period in read(path)]
    assert periods == [("a", 10, 20, 4.5), ("a", 40, 0, math.inf), ("a", 50, math.inf, math.inf)]


def test_without_marks_only_what_could_be_watched_long_enough_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        "conv,turn,start_s,end_s_est",
        "a,0,0,100",
        f"a,1,{101 + OBSERVED},{110 + OBSERVED}",
        "b,0,0,150",
        "b,1,200,3000",
        "c,0,1400,1401",
    )
    periods = [(period.session, period.gap) for period in read(path)]
    assert periods == [("a", math.inf), ("b", 50)]


@pytest.mark.parametrize("policy", ["adaptive", "adaptive-prior", "break-even"])
@pytest.mark.parametrize("engine", ["cloud", "local"])
def test_no_policy_looks_ahead(trace: Path, policy: str, engine: str) -> None:
    """Whatever comes after a moment, what was decided until then is the same."""
    terms, periods = terms_of(1, 2, 0.01, False, engine), read(trace)
    whole = play(policy_named(policy), periods, terms).thresholds
    for cut in (50, 200, 400):
        now = periods[cut].began
        other = [
            replace(period, gap=math.inf) if period.began + period.gap > now else period
            for period in periods[: cut + 1]
        ]
        assert play(policy_named(policy), other, terms).thresholds == whole[: cut + 1]


@pytest.mark.parametrize("seconds", [0, 30, 300])
def test_the_figures_of_a_fixed_threshold_are_those_of_the_formula(trace: Path, seconds: int) -> None:
    terms, periods = Terms.of(vcpu=2, gib=1, early_resume=False), read(trace)
    found = figures(f"fixed:{seconds}", periods, terms)
    billed = waited = 0.0
    for period in periods:
        if period.gap <= seconds:
            billed += period.gap
            continue
        billed += seconds + 4 + (period.gap < math.inf)
        waited += 1 + max(0.0, seconds + 4 - period.gap) if period.gap < math.inf else 0
    assert found["billed_s"] == pytest.approx(billed)
    assert found["J"] == pytest.approx(billed * terms.running + 0.01 * waited)
    assert found["lost"] == 0


def test_the_services_default_loses_who_comes_back_late_and_no_policy_here_loses_any(trace: Path) -> None:
    terms, periods = terms_of(1, 2, 0.01, True, "cloud"), read(trace)
    late = sum(300 < period.gap < math.inf for period in periods)
    assert late > 20
    assert figures("kill", periods, terms)["lost"] == late
    for name in ("adaptive", "break-even", "never", "timer"):
        found = figures(name, periods, terms)
        assert found["lost"] == found["killed"]["lost"] == 0  # type: ignore[index]


def test_what_it_writes_is_json_with_all_figures(trace: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    words = ("--gib", "0.5", "--prefetch", "0", "--policy", "adaptive", "--json", str(out), "--png", str(png))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pause", "--traces", str(trace.parent), *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"n", "n_returned", "billed_s", "usd", "blocked_share", "pause_share", "lost", "J", "J_opt"} <= set(found)
    assert {"ratio", "ratio_to_best_fixed"} <= set(found)
    assert set(found["visible"]) == {"mean", "p50", "p95", "p99", "max"}
    assert set(found["decide_us"]) == {"p50", "p99"}
    assert set(found["tau"]) == {"p10", "p50", "p90"}
    assert found["state_bytes"] <= 1024
    assert 1 <= found["ratio"] < 4
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_prior_is_spelt_so_that_it_is_read_as_it_was() -> None:
    assert [spelt(seconds) for seconds in (math.inf, 0.0, 12.345)] == ["inf", "0.0", "12.3"]
