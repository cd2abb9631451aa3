"""langchain's standard suites and deepagents itself, in the environment that deepagents needs."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.conftest import running_engine
from tests.deep.conftest import Outcome, inside

LEAST = {"suite": 79, "agents": 17, "tools": 166, "program": 3}
"""Tests that must pass: a suite that skips what it does not find would be green without them."""

KNOWN = {"suite": 7}
"""Tests that fail for a reason which is written beside them."""


@pytest.mark.parametrize("name", LEAST)
def test_all_but_the_known_exceptions_pass(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome = outcomes[name].result()
    assert outcome.code == 0, outcome.output
    assert outcome.count("passed") >= LEAST[name], outcome.output
    assert outcome.count("xfailed") == KNOWN.get(name, 0), outcome.output
    assert outcome.count("skipped") == 0, outcome.output


def test_the_example_runs(templates: Path, tmp_path: Path) -> None:
    with running_engine() as engine:
        outcome = inside(tmp_path, engine.state, "examples/deep_agent.py")
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("[The sandbox is paused.]") == 2
    assert "-> 42" in outcome.output
