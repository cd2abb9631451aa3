"""Templates from the command line, as a user and as a script has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_tools.engine.building.roots import find_root
from tests.conftest import own_state

WORDS = (sys.executable, "-m", "sandbox_tools", "template")


class Line:
    """Calls the program on a state directory of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.variables = {
            **os.environ,
            "SANDBOX_TOOLS_STATE_DIR": str(state),
            "SANDBOX_TOOLS_TEMPLATES_DIR": str(state / "templates"),
        }

    def __call__(self, *words: str, fails: int = 0) -> str:
        done = subprocess.run([*WORDS, *words], capture_output=True, text=True, env=self.variables, timeout=120)
        assert done.returncode == fails, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if fails else done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture(scope="module")
def line(templates: Path) -> Iterator[Line]:
    standard = find_root(templates)
    assert standard is not None
    with own_state() as state:
        (state / "templates/roots").mkdir(parents=True)
        subprocess.run(["cp", "--archive", "--link", standard, state / "templates/roots"], check=True)
        yield Line(state)


def test_the_built_in_templates_are_listed_before_any_is_built(line: Line) -> None:
    assert [row["name"] for row in line.json("list")] == ["base", "code-interpreter-v1"]
    assert "code-interpreter-v1" in line("list")


def test_a_template_is_built_listed_and_removed_with_what_only_it_needed(line: Line, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# what we need\ncowsay==6.1\n")
    build = ("build", "cow", "--requirements", str(requirements), "--start", "sleep 1000")

    made = line.json(*build)
    again = line.json(*build)

    assert made["template"] == again["template"]
    assert made["skipped"] is None
    assert (line.state / "templates/images" / made["template"]).is_dir()
    [row] = [row for row in line.json("list") if not row["built_in"]]
    assert (row["name"], row["template"]) == ("cow", made["template"])
    assert row["recipe"] == {"requirements": ["cowsay==6.1"], "start": "sleep 1000"}
    assert "Python: cowsay==6.1; start: sleep 1000" in line("list")

    removed = line.json("rm", "cow")
    assert removed["removed_names"] == ["cow"]
    assert f"images/{made['template']}" in removed["removed"]
    assert removed["freed_bytes"] > 10_000_000
    assert not (line.state / "templates/images" / made["template"]).exists()
    assert len(list((line.state / "templates/roots").glob("[!.]*"))) == 1
    assert "Removed 0 things" in line("prune")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("build", "base"), "built-in"),
        (("build", "--memory-mb", "1024"), "Give it a name"),
        (("build", "mine", "--packages", "jq,rm -rf"), "name of a Debian package"),
        (("build", "mine", "--cpu", "0"), "cores can't be given"),
        (("build", "mine", "--disk-mb", "0"), "can't be given. Give 1 to"),
        (("rm", "base"), "no template 'base' of your own"),
        (("prune", "--forget", "/nowhere/at/all"), "not known"),
    ],
)
def test_what_can_not_be_is_said_in_words(line: Line, words: tuple[str, ...], says: str) -> None:
    assert says in line(*words, fails=1)


def test_a_state_directory_that_is_there_is_not_forgotten(line: Line) -> None:
    assert "is there" in line("prune", "--forget", str(line.state), fails=1)


def test_what_is_no_archive_is_refused(line: Line, tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_text("not one")

    assert "docker export" in line("build", "mine", "--tarball", str(tmp_path / "image.tar"), fails=1)
    assert line("build", "mine", "--tarball", str(tmp_path / "gone.tar"), fails=2)
