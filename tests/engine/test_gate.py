"""A process that was started before its turn goes on when it is let, and never when nobody can let it any more."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sandbox_tools.engine.building.install import install_runsc
from sandbox_tools.engine.gate import Gate, end_if_shut
from sandbox_tools.engine.runsc import Runsc
from sandbox_tools.engine.runtime import Container
from sandbox_tools.errors import EngineError
from sandbox_tools.paths import state_directory

COMES = """
import sys
print("here", flush=True)
log = open(sys.argv[1].removeprefix("--log="), "a")
print("through", flush=True)
"""


@contextlib.contextmanager
def coming(gate: Gate, *, and_stays: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that comes to a gate, and stays once it is through or ends."""
    code = f"{COMES}sys.stdin.read()" if and_stays else COMES
    argv = [sys.executable, "-c", code, f"--log={gate.path}"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def test_who_comes_to_a_gate_waits_until_it_is_opened(tmp_path: Path) -> None:
    with Gate(tmp_path) as gate, coming(gate) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)

        gate.open()

        out, _ = process.communicate(timeout=10)
        assert (out, process.returncode) == ("through\n", 0)


def test_a_gate_that_is_open_before_anybody_comes_holds_nobody_up_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    (tmp_path / "gate").write_text("left by a crash")
    with Gate(tmp_path) as gate:
        gate.open()
        with coming(gate) as process:
            assert process.wait(10) == 0

    assert list(tmp_path.iterdir()) == []


def test_who_waits_where_nobody_can_open_is_ended_and_who_is_through_is_left(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Gate(tmp_path) as shut, Gate(tmp_path / "link") as gate:
        with coming(shut) as waiting, coming(gate, and_stays=True) as through:
            gate.open()
            assert through.stdout is not None
            assert through.stdout.readline() == "through\n"

            for each in (waiting, through):
                end_if_shut(each.pid)

            assert waiting.wait(10) == -9
            assert through.poll() is None


@pytest.mark.usefixtures("templates")
def test_an_engine_does_not_wait_for_a_runsc_that_its_predecessor_left_at_a_gate(tmp_path: Path) -> None:
    binary = install_runsc(state_directory()).path
    with Gate(tmp_path) as gate:
        argv = [str(binary), f"--root={tmp_path}", f"--log={gate.path}", "checkpoint", "--image-path=/x", "x"]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as left:
            asyncio.run(asyncio.wait_for(Runsc(binary, tmp_path).settle(), 20))

            assert left.wait(10) == -9


@pytest.mark.usefixtures("templates")
async def test_a_checkpoint_never_begins_where_what_it_waits_for_fails(tmp_path: Path) -> None:
    container = Container(id="x", directory=tmp_path, binary=install_runsc(state_directory()).path)
    (tmp_path / "image").mkdir()
    freezing = asyncio.get_running_loop().create_future()
    freezing.set_exception(EngineError("it could not be frozen"))

    with pytest.raises(EngineError, match="it could not be frozen"):
        await Runsc(container.binary, tmp_path / "runsc").checkpoint(container, tmp_path / "image", after=freezing)

    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert list((tmp_path / "image").iterdir()) == []
    assert not [each for each in psutil.Process().children() if "checkpoint" in each.cmdline()]
