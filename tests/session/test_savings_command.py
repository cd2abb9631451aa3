"""`sandbox-tools savings`, as a user calls it, over a file that sessions have written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_tools.policy.savings import Change
from sandbox_tools.session.bindings import SqliteBindings


def savings(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox_tools", "savings", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        timeout=60,
        check=False,
    )


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    bindings = SqliteBindings(tmp_path / "sessions.db")
    for handle, owner, thread in (("h1", "ann", "t1"), ("h2", "ann", "t2"), ("h3", "bob", "t1")):
        for at, what in ((1000.0, "running"), (1100.0, "paused"), (2000.0, "killed")):
            change = Change(at=at, state=what, idle_since=at - 10, running=3e-5)  # type: ignore[arg-type]
            await bindings.record(handle, owner, thread, change)
    await bindings.aclose()
    return tmp_path


def test_all_files_of_the_state_directory_are_shown_by_owner(state: Path) -> None:
    done = savings("--state-dir", str(state))
    assert done.returncode == 0, done.stderr
    _, below = done.stdout.split("───", 1)[1].split("\n", 1)
    first = [line.split()[:3] for line in below.splitlines() if line.strip()]
    assert first == [["ann", "3.3", "min"], ["bob", "1.7", "min"], ["all", "5.0", "min"]]


def test_one_file_one_owner_each_sandbox_as_json_and_a_plot(state: Path) -> None:
    plot = state / "plot.png"
    words = ("--by", "sandbox", "--owner", "ann", "--json", "--png", str(plot))
    done = savings("--bindings", str(state / "sessions.db"), *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["owner"], row["thread"], row["sandbox"]) for row in rows] == [("ann", "t1", "h1"), ("ann", "t2", "h2")]
    assert [(row["running"], row["paused"], row["pauses"]) for row in rows] == [(100, 900, 1)] * 2
    assert rows[0]["spent"] == pytest.approx(100 * 3e-5)
    assert rows[0]["timer"] == pytest.approx((90 + 300) * 3e-5)
    assert rows[0]["saved_against_timer"] == pytest.approx(290 * 3e-5)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [("--owner", "nobody"), ("--bindings", "gone.db")])
def test_what_is_not_on_record_is_told_in_words_and_makes_no_file(state: Path, words: tuple[str, ...]) -> None:
    before = sorted(path.name for path in state.iterdir())
    done = savings("--state-dir", str(state), *words)
    assert done.returncode == 1
    assert words[1] in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in state.iterdir()) == before


def test_a_machine_without_sessions_has_nothing_on_record(tmp_path: Path) -> None:
    done = savings("--state-dir", str(tmp_path))
    assert done.returncode == 1
    assert "No sandbox is on record" in done.stderr
