"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_tools.engine.exclusive import sole_engine


def sandbox_tools(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox_tools", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_doctor_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    """And its exit code says it to scripts."""
    done = sandbox_tools("doctor", "--state-dir", str(tmp_path), SANDBOX_TOOLS_RUNSC=str(tmp_path / "gone"))

    assert done.returncode == 1
    assert "MISSING  runsc" in done.stdout
    assert "SANDBOX_TOOLS_RUNSC" in done.stdout


def test_doctor_changes_nothing(tmp_path: Path) -> None:
    sandbox_tools(
        "doctor", "--state-dir", str(tmp_path / "state"), SANDBOX_TOOLS_TEMPLATES_DIR=str(tmp_path / "templates")
    )

    assert not list(tmp_path.iterdir())


def test_doctor_speaks_json(tmp_path: Path) -> None:
    runsc = tmp_path / "runsc"
    runsc.write_text("#!/bin/sh\necho runsc version release-20250601.0\n")
    runsc.chmod(0o755)

    done = sandbox_tools("doctor", "--json", "--state-dir", str(tmp_path), SANDBOX_TOOLS_RUNSC=str(runsc))

    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert found["runsc"]["ok"]
    assert "20250601" in found["runsc"]["words"]
    assert set(found) == {
        *("machine", "packages", "namespaces", "control groups"),
        *("state directory", "disk", "memory for snapshots", "runsc", "root file system", "engine"),
    }


def test_a_key_is_rotated_and_not_under_a_running_engine(tmp_path: Path) -> None:
    words = ("key", "rotate", "--json", "--state-dir", str(tmp_path))
    first, second = (json.loads(sandbox_tools(*words).stdout) for _ in range(2))

    assert first["key_id"] != second["key_id"]
    assert (second["moved"], second["lost"]) == (0, [])
    assert (tmp_path / "snapshot.key").stat().st_mode & 0o777 == 0o600
    assert "Put a new one before" in sandbox_tools(*words, SANDBOX_TOOLS_SNAPSHOT_KEY="x").stderr
    with sole_engine(tmp_path):
        refused = sandbox_tools(*words)
    assert refused.returncode == 1
    assert "Stop it first" in refused.stderr


@pytest.mark.parametrize("words", [("doctor",), ("setup",)])
def test_a_state_directory_that_can_not_be_is_an_error_in_words(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")

    done = sandbox_tools(*words, "--state-dir", str(tmp_path / "file/state"))

    assert done.returncode == 1
    assert "SANDBOX_TOOLS_STATE_DIR" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_two_kinds_of_address_at_once(tmp_path: Path) -> None:
    done = sandbox_tools("serve", "--state-dir", str(tmp_path), "--uds", str(tmp_path / "s"), "--port", "0")

    assert done.returncode == 1
    assert "not on both" in done.stderr


def test_a_missing_extra_is_named_with_the_words_that_install_it(tmp_path: Path) -> None:
    """A cloud user has no server packages; asking for the engine tells what to install."""
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from sandbox_tools.cli import main; sys.exit(main(['serve', '--state-dir', sys.argv[1]]))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 1
    assert "pip install 'sandbox-tools[local]'" in done.stderr


def test_a_wrong_command_line_is_told_apart_from_a_failure() -> None:
    assert sandbox_tools("no-such-command").returncode == 2
