"""Runs what lies in `inside` in the environment of deepagents, each file on an engine of its own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import running_engine
from tests.sdk.environments import environment

collect_ignore = ["inside"]  # needs another environment

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside"
FILES = ("suite", "agents", "tools", "program")
AT_ONCE = 2
MINUTES = 8  # in which a file that has not ended is broken


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one file."""

    code: int
    output: str

    def count(self, what: str) -> int:
        """How many tests `passed`, `failed`, `xfailed`, ..., as pytest's last line has it."""
        found = re.search(rf"(\d+) {what}\b", self.output.splitlines()[-1])
        return int(found[1]) if found else 0


def inside(directory: Path, state: Path, *command: str) -> Outcome:
    """Runs Python there, with this tree's package and nothing of the main environment."""
    home = environment("deepagents")
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(home / "beside"))),
        "ENGINE_STATE": str(state),
        "SANDBOX_TOOLS_STATE_DIR": str(state),
    }
    done = subprocess.run(
        [str(home / "bin" / "python"), *command],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MINUTES * 60,
    )
    return Outcome(code=done.returncode, output=done.stdout.rstrip())


@pytest.fixture(scope="session")
def outcomes(
    templates: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """The files that the chosen tests need, begun two at a time."""

    def run(name: str) -> Outcome:
        options = ("--confcutdir", str(INSIDE), "-p", "no:cacheprovider", "--quiet", "--durations=0")
        with running_engine() as engine:
            directory = tmp_path_factory.mktemp(name)
            return inside(directory, engine.state, "-m", "pytest", *options, str(INSIDE / f"{name}.py"))

    chosen = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = {name: pool.submit(run, name) for name in FILES if name in chosen}
        request.config.stash[COUNTS] = begun
        yield begun


COUNTS = pytest.StashKey[dict[str, Future[Outcome]]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says how many of the standard suites' tests have passed, also where all is well."""
    for name, outcome in config.stash.get(COUNTS, {}).items():
        if outcome.done() and not outcome.exception():
            terminalreporter.write_line(f"inside deepagents: {name}: {outcome.result().output.splitlines()[-1]}")
