"""Sandboxes from the command line, as a person and as a script has them, over a real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.machine import Box, EngineProcess

WORDS = (sys.executable, "-m", "sandbox_tools")


@pytest.fixture
def engine_and_nothing_else(engine: EngineProcess) -> Iterator[EngineProcess]:
    yield engine
    engine.clear()


class Line:
    """Calls the program on one engine."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine
        self.variables = {**os.environ, "SANDBOX_TOOLS_STATE_DIR": str(engine.state)}

    def __call__(self, *words: str, fails: int = 0, given: str = "") -> str:
        done = subprocess.run(
            [*WORDS, *words], capture_output=True, text=True, env=self.variables, timeout=120, input=given
        )
        assert done.returncode == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def json(self, *words: str, fails: int = 0) -> Any:
        done = subprocess.run(
            [*WORDS, *words, "--json"], capture_output=True, text=True, env=self.variables, timeout=120
        )
        assert done.returncode == fails, done.stdout + done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    def terminal(self, *words: str, **options: Any) -> pexpect.spawn:
        return pexpect.spawn(
            WORDS[0],
            [*WORDS[1:], *words],
            env={**self.variables, "TERM": "xterm-256color"},
            encoding="utf-8",
            timeout=60,
            **{"dimensions": (40, 120), **options},
        )


@pytest.fixture
def line(engine_and_nothing_else: EngineProcess) -> Line:
    return Line(engine_and_nothing_else)


@pytest.fixture
def box(line: Line) -> Box:
    return line.engine.create(metadata={"sandbox_tools.owner": "ann", "sandbox_tools.thread": "chat"})


def test_a_sandbox_is_listed_paused_resumed_and_ended_by_the_beginning_of_its_id(line: Line, box: Box) -> None:
    first = box.id[:8]
    assert re.search(rf"{box.id}\s+running.*ann\s+chat", line("ps"))
    assert line("pause", first) == f"{box.id} paused\n"
    assert line("pause", first) == f"{box.id} was paused already\n"
    assert re.search(rf"{box.id}\s+paused.*deleted in 30\.0 d\s+\d+ MB on disk", line("ps", "--state", "paused"))
    assert line.json("resume", first) == [{"sandbox_id": box.id, "outcome": "resumed"}]
    assert [row["state"] for row in line.json("ps")] == ["running"]
    messages = [entry["message"] for entry in line.json("logs", first)]
    assert messages[0].startswith("created from")
    assert messages[1:] == ["paused", "resumed"]
    assert "paused" in line("logs", first)
    assert line("rm", first) == f"{box.id} ended\n"
    assert line.json("ps") == []


def test_what_is_not_there_is_said_and_the_others_are_done(line: Line, box: Box) -> None:
    assert "no sandbox's id" in line("pause", "inobody", box.id, fails=1)
    assert box.info()["state"] == "paused"
    outcomes = line.json("rm", "inobody", box.id, fails=1)
    assert [sorted(outcome) for outcome in outcomes] == [["error", "sandbox_id"], ["outcome", "sandbox_id"]]


def test_an_id_of_several_is_refused(line: Line) -> None:
    line.engine.create()
    line.engine.create()
    assert "begins the ids of 2 sandboxes" in line("rm", "i", fails=1)
    assert len(line.engine.rows()) == 2


def test_code_runs_from_a_file_or_from_standard_input_and_its_failure_is_the_exit_code(
    line: Line, tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text("print('out')\n40 + 2")
    assert line("run", str(tmp_path / "code.py")) == "out\n42\n"
    assert line("run", "-", given="print(6 * 7)") == "42\n"
    assert "ZeroDivisionError" in line("run", "-", given="1 / 0", fails=4)
    assert "timeout" in line("run", "-", "--timeout", "0.5", given="import time; time.sleep(60)", fails=4)
    assert line.engine.rows() == []


def test_a_sandbox_that_is_kept_has_what_the_code_left(line: Line) -> None:
    line("run", "-", "--keep", given="x = 41")
    [row] = line.engine.rows()
    assert row["state"] == "paused"
    done = subprocess.run(
        [*WORDS, "run", "-", "--sandbox", row["sandboxID"], "--json"],
        input="x + 1",
        capture_output=True,
        text=True,
        env=line.variables,
        timeout=120,
    )
    assert json.loads(done.stdout)["results"][0]["text"] == "42"


def test_files_are_copied_in_and_out_whole(line: Line, box: Box, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "in.bin").write_bytes(data)
    assert line("cp", str(tmp_path / "in.bin"), f"{box.id[:8]}:deep/data.bin") == (
        "/home/user/deep/data.bin: 3000000 bytes\n"
    )
    line("cp", f"{box.id}:deep/data.bin", str(tmp_path / "out.bin"))
    assert (tmp_path / "out.bin").read_bytes() == data
    assert line.json("cp", f"{box.id}:deep/data.bin", str(tmp_path))["path"] == str(tmp_path / "data.bin")
    line("cp", f"{box.id}:no", str(tmp_path / "none"), fails=1)
    line("cp", "here", "there", fails=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "in.bin", "out.bin"]


def test_snapshots_and_forks_are_made_and_used(line: Line, box: Box) -> None:
    box.run("x = 41")
    taken = line.json("snapshot", "take", box.id, "--name", "kept")
    assert line("snapshot", "ls").startswith(taken[0]["snapshot_id"])
    [copy] = line("fork", box.id).split()
    assert line("run", "-", "--sandbox", copy, given="x + 1") == "42\n"
    line("snapshot", "rm", "kept")
    assert line.json("snapshot", "ls") == []
    line("snapshot", "rm", "kept", fails=1)


def test_only_what_has_slept_for_long_is_pruned_and_only_when_it_is_said(line: Line, box: Box) -> None:
    running = line.engine.create()
    box.post("pause")
    assert line.json("prune", "--dry-run") == []
    assert [row["sandbox_id"] for row in line.json("prune", "--older-than", "0", "--dry-run")] == [box.id]
    assert [row["sandbox_id"] for row in line.json("prune", "--older-than", "0", "--owner", "bob", "--dry-run")] == []
    line("prune", "--older-than", "0", given="n\n", fails=130)
    assert len(line.engine.rows()) == 2
    assert f"{box.id} ended" in line("prune", "--older-than", "0", given="y\n")
    assert [row["sandboxID"] for row in line.engine.rows()] == [running.id]


def test_a_provider_elsewhere_is_looked_at_by_its_key_and_whether_it_answers(line: Line) -> None:
    line.variables["E2B_API_KEY"] = "e2b_" + "0" * 40
    line.variables["E2B_API_URL"] = "http://127.0.0.1:9"
    findings = {finding["what"]: finding for finding in line.json("doctor", fails=1)}
    assert findings["provider"]["words"] == "e2b at http://127.0.0.1:9"
    assert not findings["reachability"]["ok"]
    line.variables["PPIO_API_KEY"] = "sk_x"
    assert "PPIO_API_KEY" in line.json("doctor", fails=1)[0]["words"]


def test_a_shells_completion_knows_the_commands(line: Line) -> None:
    assert "_SANDBOX_TOOLS_COMPLETE=bash_complete" in line("completion", "bash")
    asked = {"_SANDBOX_TOOLS_COMPLETE": "bash_complete", "COMP_WORDS": "sandbox-tools sna", "COMP_CWORD": "1"}
    line.variables.update(asked)
    assert line() == "plain,snapshot\n"


def test_a_shell_in_a_real_terminal_is_one_of_the_sandbox(line: Line, box: Box) -> None:
    box.post("pause")
    terminal = line.terminal("shell", box.id[:8])
    terminal.expect(r"\$ ")
    terminal.sendline("stty size; echo at-$(hostname) $((6 * 7))")
    terminal.expect(r"40 120\r\n")
    terminal.expect(r"at-\S+ 42\r\n")
    terminal.setwinsize(30, 90)
    terminal.expect(r"\$ ")
    for _ in range(50):
        terminal.sendline("stty size")
        if terminal.expect([r"30 90\r\n", r"40 120\r\n"]) == 0:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the shell has not heard of its new size")
    terminal.sendline("cat")
    terminal.sendline("hel''lo")
    terminal.expect("hel''lo\r\n.*hel''lo")  # as typed, and from `cat`: it has the terminal
    terminal.sendcontrol("c")
    terminal.expect(r"\$ ")
    terminal.sendline("exit 7")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 7


def test_the_terminal_is_as_it_was_when_the_shell_is_cut_off(line: Line, box: Box) -> None:
    """In a shell of this machine, which goes on in the same terminal."""
    terminal = pexpect.spawn("/bin/sh", env={**line.variables, "PS1": "here> "}, encoding="utf-8", timeout=60)
    terminal.expect("here> ")
    terminal.sendline(f"stty -a | md5sum; {' '.join(WORDS)} shell {box.id}; stty -a | md5sum; echo ended")
    before = terminal.expect(r"([0-9a-f]{32})") or terminal.match[1]
    terminal.expect(r"\$ ")
    box.kill()
    after = terminal.expect(r"([0-9a-f]{32})") or terminal.match[1]
    terminal.expect("ended")
    assert before == after
    terminal.close(force=True)


def test_without_a_terminal_a_shell_says_what_to_use(line: Line, box: Box) -> None:
    assert "Use `run`" in line("shell", box.id, fails=1)


def test_a_watched_list_follows_what_sandboxes_do_until_it_is_interrupted(line: Line, box: Box) -> None:
    terminal = line.terminal("ps", "--watch", "--every", "0.2")
    terminal.expect(f"{box.id}.*running")
    box.post("pause")
    terminal.expect(f"{box.id}.*paused")
    box.kill()
    terminal.sendcontrol("c")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    line("ps", "--watch", "--json", fails=2)


def test_long_work_shows_how_far_it_is_on_a_terminal(line: Line, box: Box, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(50_000_000))
    terminal = line.terminal("cp", str(tmp_path / "big"), f"{box.id}:big")
    terminal.expect(r"50\.0/50\.0 MB|\d+\.\d/50\.0")
    terminal.expect(r"/home/user/big: 50000000 bytes")
    terminal.expect(pexpect.EOF)
    terminal = line.terminal("pause", box.id)
    terminal.expect(rf"pausing {box.id}.*\d:\d\d:\d\d")
    terminal.expect(f"{box.id} paused")
    terminal.expect(pexpect.EOF)
