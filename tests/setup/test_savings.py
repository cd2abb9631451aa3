"""`sandbox-tools savings` tells what is in the bindings, to people and to scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandbox_tools.cli import main
from sandbox_tools.policy.savings import Change
from sandbox_tools.session.bindings import SqliteBindings


@pytest.fixture
async def place(tmp_path: Path) -> Path:
    path = tmp_path / "sessions.db"
    bindings = SqliteBindings(path)
    for owner, handle in (("ann", "h1"), ("bob", "h2"), ("bob", "h3")):
        for at, state in ((0.0, "running"), (100.0, "paused"), (1000.0, "running"), (1010.0, "killed")):
            change = Change(at=at, state=state, idle_since=at, running=0.01, waited=1.0)  # type: ignore[arg-type]
            await bindings.record(handle, owner, "t", change)
    await bindings.aclose()
    return path


def test_sums_are_by_owner_and_the_last_row_is_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["savings", "--bindings", str(place), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == ["ann", "bob", "all"]
    assert rows["bob"]["spent"] == pytest.approx(2.2)
    assert rows["all"]["saved_against_always_on"] == pytest.approx(3 * 9.0)
    assert rows["all"]["saved_against_timer"] == pytest.approx(3 * 3.0)


def test_a_table_and_a_plot_are_drawn(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "savings.png"
    assert main(["savings", "--bindings", str(place), "--by", "sandbox", "--owner", "bob", "--png", str(png)]) == 0
    shown = capsys.readouterr().out
    assert "bob / t / h2" in shown
    assert "ann" not in shown
    assert png.read_bytes().startswith(b"\x89PNG")


def test_where_nothing_has_run_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["savings", "--bindings", str(tmp_path / "none.db")]) == 1
    assert "no session has run here" in capsys.readouterr().err
