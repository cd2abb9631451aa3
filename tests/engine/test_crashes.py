"""Whatever dies, and whenever: what was paused can be resumed, and what ran is adopted or reported lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from sandbox_tools.engine import usage
from tests.machine import EngineProcess

MEMORY = "kept = 'yes'; blob = b'x' * (100 << 20)"


def kill_containers(engine: EngineProcess) -> None:
    """What a reboot does to them."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = process.read_text(errors="replace").split("\0")
        except OSError:
            continue
        if f"--root={engine.state / 'runsc'}" in argv:
            os.kill(int(process.parent.name), signal.SIGKILL)


def test_paused_and_running_sandboxes_outlive_a_killed_engine(own_engine: EngineProcess) -> None:
    paused, running = own_engine.create(), own_engine.create()
    for box in (paused, running):
        box.run("kept = 'yes'")
    paused.post("pause")

    own_engine.kill()
    own_engine.start()

    assert running.info()["state"] == "running"
    assert running.value("kept") == "yes"
    assert paused.info()["state"] == "paused"
    paused.post("connect", timeout=600)
    assert paused.value("kept") == "yes"


def test_a_client_in_the_middle_of_a_stream_sees_it_broken_when_the_engine_dies_and_the_code_is_interrupted(
    own_engine: EngineProcess,
) -> None:
    box = own_engine.create()
    box.run("kept = 'yes'")
    with box.stream("while True: print('on and on')") as events:
        next(events)
        own_engine.kill()
        with pytest.raises(httpx.TransportError):
            list(events)

    own_engine.start()
    assert box.value("kept") == "yes"


def test_after_a_reboot_paused_sandboxes_are_whole_and_running_ones_are_reported_lost(
    own_engine: EngineProcess,
) -> None:
    paused, running = own_engine.create(), own_engine.create()
    paused.run("kept = 'yes'")
    paused.post("pause")

    own_engine.kill()
    kill_containers(own_engine)
    own_engine.start()

    answer = running.post("connect", timeout=600)
    assert answer.status_code == 404
    assert "restarted" in answer.json()["message"]
    paused.post("connect", timeout=600)
    assert paused.value("kept") == "yes"


@pytest.mark.parametrize("seconds", [0.03, 0.12, 0.3])
@pytest.mark.parametrize("verb", ["pause", "connect"])
def test_an_engine_killed_at_any_moment_of_a_transition_loses_nothing(
    own_engine: EngineProcess, verb: str, seconds: float
) -> None:
    box = own_engine.create()
    box.run(MEMORY)
    if verb == "connect":
        box.post("pause")

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError):  # the engine dies under the request
            box.post(verb, timeout=600)

    asking = threading.Thread(target=ask)
    asking.start()
    threading.Event().wait(seconds)
    own_engine.kill()
    asking.join()
    own_engine.start()

    answer = box.post("connect", timeout=600)
    assert answer.status_code in (200, 201), answer.text
    assert box.value("kept, len(blob)") == "('yes', 104857600)"
    assert len(own_engine.containers()) == 1


@pytest.mark.soak
def test_a_running_sandbox_that_cannot_be_reached_is_kept_until_it_can(own_engine: EngineProcess) -> None:
    """A new engine gives a guest 30 s to answer; silence is no death."""
    box = own_engine.create()
    box.run("kept = 'yes'")
    own_engine.kill()
    container = int(next((own_engine.state / "sandboxes" / box.id).glob("run-*/pid")).read_text())
    # What gVisor runs the guest in, and not gVisor itself, which a new engine would let go on.
    for process in usage.with_descendants(container)[1:]:
        os.kill(process, signal.SIGSTOP)
    own_engine.start()
    assert "can't be reached" in own_engine.log()
    for process in usage.with_descendants(container)[1:]:
        os.kill(process, signal.SIGCONT)

    assert box.info()["state"] == "running"
    assert box.post("connect", timeout=600).status_code == 200
    assert box.value("kept") == "yes"


def test_a_half_written_snapshot_is_swept_and_a_torn_one_is_refused(own_engine: EngineProcess) -> None:
    box = own_engine.create()
    box.post("pause")
    snapshots = own_engine.state / "snapshots" / box.id
    own_engine.kill()
    (snapshots / ".partial-2").mkdir()
    (snapshots / ".partial-2" / "pages.img").write_bytes(b"half")
    (pages,) = snapshots.glob("[!.]*/pages.img")
    whole = pages.read_bytes()
    pages.write_bytes(whole[:-4096])
    own_engine.start()

    answer = box.post("connect", timeout=600)

    assert answer.status_code == 500
    assert "torn" in answer.json()["message"]
    assert not (snapshots / ".partial-2").exists()
    assert box.info()["state"] == "paused"
    # Nothing was thrown away: with its bytes back it wakes.
    pages.write_bytes(whole)
    assert box.post("connect", timeout=600).status_code == 201


@pytest.mark.parametrize("name", ["pages.img", "checkpoint.img"])
def test_a_snapshot_whose_bytes_have_changed_is_refused_and_kept(own_engine: EngineProcess, name: str) -> None:
    """As after a disk that lost what it had said was written: all there, at its full size."""
    box = own_engine.create()
    box.run("kept = 'yes'")
    box.post("pause")
    (file,) = (own_engine.state / "snapshots" / box.id).glob(f"[!.]*/{name}")
    whole = file.read_bytes()
    lost = min(len(whole), 4 << 20)
    file.write_bytes(bytes(lost) + whole[lost:])

    answer = box.post("connect", timeout=600)

    assert answer.status_code == 500
    assert "damaged" in answer.json()["message"]
    assert box.info()["state"] == "paused"
    file.write_bytes(whole)
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value("kept") == "yes"


def test_an_engine_that_is_told_to_stop_pauses_what_runs(own_engine: EngineProcess) -> None:
    box = own_engine.create()
    box.run("kept = 'yes'")

    assert own_engine.stop() == 0

    assert own_engine.containers() == []
    own_engine.start()
    assert box.info()["state"] == "paused"
    box.post("connect", timeout=600)
    assert box.value("kept") == "yes"
