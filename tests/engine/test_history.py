"""The last pauses of a sandbox can be gone back to where that was asked for, and all snapshots stay in their bounds."""

from __future__ import annotations

import contextlib
import threading
import time

import httpx
import pytest

from tests.conftest import own_state
from tests.machine import PATIENCE, Box, EngineProcess


def pauses(engine: EngineProcess, box: Box) -> list[str]:
    """The snapshots that are kept of a sandbox, newest first."""
    with engine.http() as http:
        return [row["snapshotID"] for row in http.get("/snapshots", params={"sandboxID": box.id}).json()]


def turn(box: Box, number: int) -> None:
    """Code, a pause, and the resume."""
    box.run(f"turn = {number}; open('/home/user/turn', 'w').write('{number}')")
    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201


def test_the_last_pauses_are_kept_and_each_is_a_sandbox_again_memory_and_files(engine: EngineProcess) -> None:
    box = engine.create(keepHistory=2)
    for number in range(4):
        turn(box, number)

    kept = pauses(engine, box)

    assert len(kept) == 2
    for snapshot, number in zip(kept, (3, 2), strict=True):
        earlier = engine.create(templateID=snapshot)
        assert earlier.value("turn, open('/home/user/turn').read()") == f"({number}, '{number}')"
        earlier.kill()
    assert box.value("turn") == "3"
    assert box.kill() == 204
    assert pauses(engine, box) == []
    assert not list((engine.state / "saved").iterdir())


def test_without_being_asked_for_no_pause_is_kept(engine: EngineProcess) -> None:
    box = engine.create()
    turn(box, 1)
    assert pauses(engine, box) == []
    deadline = time.monotonic() + PATIENCE
    while list((engine.state / "snapshots" / box.id).glob("*")):  # it goes behind the answer
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with engine.http() as http:
        assert http.post("/sandboxes", json={"templateID": "base", "keepHistory": 101}).status_code == 400
    box.kill()


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.35, 0.5, 0.7])
def test_an_engine_killed_while_it_resumes_keeps_the_pause_or_the_sandbox_paused(
    own_engine: EngineProcess, seconds: float
) -> None:
    box = own_engine.create(keepHistory=1)
    box.run("kept = 'yes'")
    box.post("pause")

    def connect() -> None:
        with contextlib.suppress(httpx.TransportError):
            box.post("connect", timeout=600)

    connecting = threading.Thread(target=connect)
    connecting.start()
    time.sleep(seconds)
    own_engine.kill()
    connecting.join()
    own_engine.start()

    assert len(pauses(own_engine, box)) == (1 if box.info()["state"] == "running" else 0)
    box.post("connect", timeout=600)
    (only,) = pauses(own_engine, box)
    for each in (box, own_engine.create(templateID=only)):
        assert each.value("kept") == "yes"


def test_what_is_over_the_bound_costs_the_oldest_kept_pauses_first_and_is_refused_then(templates: object) -> None:
    with own_state() as state:
        options = ("--keep-history", "5", "--max-snapshot-mb", "380")
        engine = EngineProcess(state, options=options).start()
        try:
            box = engine.create()
            for number in range(3):
                turn(box, number)
            kept = pauses(engine, box)
            assert 1 <= len(kept) < 3  # some 125 MB each; what is being written counts with the 150 that it may need

            box.post("pause")
            others = [engine.create() for _ in range(3)]
            refused = [other for other in others if other.post("pause").status_code == 500]

            assert pauses(engine, box) == []
            assert refused
            answer = refused[0].post("pause")
            assert "goes on running" in answer.json()["message"]
            assert "380 MB" in answer.json()["message"]
            assert refused[0].value("1 + 1") == "2"
            box.post("connect", timeout=600)
            assert box.value("turn") == "2"
        finally:
            engine.clear()
            engine.stop()
