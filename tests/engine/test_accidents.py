"""Code that misbehaves and disks that fill: said in words, and the rest lives on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import as_root, own_state
from tests.machine import Box, EngineProcess


@pytest.fixture
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


def errors(events: list[dict[str, str]]) -> list[str]:
    return [event["value"] for event in events if event["type"] == "error"]


def memory_of(engine: EngineProcess) -> int:
    """Peak RSS in bytes of the engine's process."""
    status = Path(f"/proc/{engine.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_code_that_never_ends_is_interrupted_when_its_caller_leaves_and_the_state_is_kept(box: Box) -> None:
    box.run("kept = 'yes'")
    with box.stream("while True: pass") as events:
        next(events)

    assert box.value("kept") == "yes"


def test_200_mb_of_output_arrive_whole_and_the_engine_stays_small(box: Box) -> None:
    before = memory_of(box.engine)
    received = 0
    with box.stream("for _ in range(200): print('x' * ((1 << 20) - 1))") as events:
        for event in events:
            received += len(event.get("text", ""))

    assert received == 200 << 20
    assert memory_of(box.engine) - before < 40 << 20


def test_a_50_mb_plot_arrives_whole_and_the_engine_stays_small(box: Box) -> None:
    before = memory_of(box.engine)
    code = "import os, IPython.display; IPython.display.Image(data=os.urandom(50 << 20), format='png')"

    pictures = [event["png"] for event in box.run(code) if "png" in event]

    assert len(pictures[0]) > 50 << 20
    assert memory_of(box.engine) - before < 40 << 20


def test_code_that_kills_its_kernel_is_told_what_is_lost_and_what_is_kept(box: Box) -> None:
    box.run("variable = 1; open('/home/user/file', 'w').write('kept')")

    said = errors(box.run("import os; os._exit(9)"))

    assert "variables" in said[0]
    assert box.value("open('/home/user/file').read()") == "kept"
    assert "NameError" in str(box.run("variable"))


def test_code_that_asks_for_too_much_memory_gets_a_memory_error_and_keeps_its_variables(box: Box) -> None:
    box.run("kept = 'yes'")

    events = box.run("b'x' * (8 << 30)")

    assert [event["name"] for event in events if event["type"] == "error"] == ["MemoryError"]
    assert box.value("kept") == "yes"


@as_root
def test_processes_that_together_fill_the_memory_are_stopped_or_end_the_sandbox_and_the_reason_is_said(
    engine: EngineProcess,
) -> None:
    """gVisor may refuse them the memory, or the host may end the sandbox; the host itself is safe either way."""
    box = engine.create()
    hog = "import time; blob = b'x' * (700 << 20); time.sleep(600)"
    ended = "sum(hog.poll() is not None for hog in hogs)"
    try:
        with contextlib.suppress(httpx.TransportError):  # the sandbox may end under the request
            box.run(
                f"import subprocess, sys\nhogs = [subprocess.Popen([sys.executable, '-c', {hog!r}]) for _ in range(4)]"
            )
            while box.value(ended) == "0":
                continue
            assert box.value("1 + 1") == "2"
            return

        assert "2048 MB" in box.wait_gone()
    finally:
        box.kill()


@as_root
def test_a_full_disk_fails_the_pause_and_the_sandbox_goes_on_running(templates: Path) -> None:
    with own_state() as state:
        snapshots = state / "snapshots"
        snapshots.mkdir()
        small = f'mount -t tmpfs -o size=24m none {snapshots} && exec "$@"'
        engine = EngineProcess(state, prefix=("unshare", "--mount", "sh", "-c", small, "sh")).start()
        try:
            box = engine.create()
            pid = box.value("import os; kept = 'yes'; os.getpid()")

            answer = box.post("pause")

            assert answer.status_code == 500
            assert "goes on running" in answer.json()["message"]
            assert "no space" in answer.json()["message"].lower()
            assert box.info()["state"] == "running"
            assert box.value("kept, os.getpid()") == f"('yes', {pid})"

            assert box.post("freeze").status_code == 204
            assert "goes on running" in box.post("pause").json()["message"]
            assert "frozenSince" not in box.info()
            assert box.value("kept, os.getpid()") == f"('yes', {pid})"
            assert box.kill() == 204
        finally:
            engine.stop()
        assert engine.containers() == []
