"""How long a sandbox lives, what becomes of it at its end, and what it comes back with."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandbox_tools.engine import runsc
from sandbox_tools.engine.runtime import Container
from tests.engine.inside import EngineInside, engine_inside
from tests.machine import PATIENCE, Box, EngineProcess


@pytest.fixture
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


@pytest.fixture(scope="module")
def inside(templates: Path) -> Iterator[EngineInside]:
    """An engine with a clock that can be put forward, and room for two sandboxes."""
    with engine_inside(templates, max_sandboxes=2) as engine:
        yield engine


@pytest.fixture
def two(inside: EngineInside) -> Iterator[EngineInside]:
    """The same, empty before and after and with the right time."""
    yield inside
    inside.ahead = timedelta()
    inside.clear()


def at(info: dict[str, Any], name: str) -> datetime:
    return datetime.fromisoformat(info[name])


LIVE = """
import os, subprocess
kept = 1
open('/home/user/file', 'w').write('there')
open('/dev/shm/memory', 'w').write('gone')
child = subprocess.Popen(['sleep', '1000'])
"""
LEFT = """
import glob, subprocess
(
    'kept' in globals(), open('/home/user/file').read(), glob.glob('/dev/shm/*'),
    subprocess.run(['pgrep', '-c', 'sleep'], capture_output=True, text=True).stdout.strip(),
    os.environ['GIVEN'] if (os := __import__('os')) else '',
)
"""
REBOOTED = "(False, 'there', [], '0', 'yes')"


def test_a_pause_without_memory_keeps_files_and_ends_processes(engine: EngineProcess) -> None:
    """PROTOCOL.md section 6: the resume of such a pause is a cold boot."""
    box = engine.create(envVars={"GIVEN": "yes"})
    box.run(LIVE)
    assert box.post("pause", memory=False).status_code == 204

    info = box.info()
    assert (info["state"], info["pauseMode"]) == ("paused", "filesystem")
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value(LEFT) == REBOOTED
    assert "pauseMode" not in box.info()

    box.post("pause")
    assert box.info()["pauseMode"] == "full"
    box.kill()


def test_a_resume_without_memory_is_a_reboot(engine: EngineProcess) -> None:
    box = engine.create(envVars={"GIVEN": "yes"})
    box.run(LIVE)
    box.post("pause")
    assert box.post("connect", timeout=600, memory=False).status_code == 201
    assert box.value(LEFT) == REBOOTED

    # Of one that runs it asks nothing.
    box.run("kept = 2")
    assert box.post("connect", timeout=600, memory=False).status_code == 200
    assert box.value("kept") == "2"
    box.kill()


def test_ppios_reset_reboots_what_runs_and_what_sleeps(engine: EngineProcess) -> None:
    box = engine.create(envVars={"GIVEN": "yes"})
    box.run(LIVE)
    assert box.post("reset", resume=True).status_code == 200
    assert box.value(LEFT) == REBOOTED

    box.run("kept = 1")
    assert box.post("reset", resume=False).status_code == 200
    assert box.info()["pauseMode"] == "filesystem"
    assert box.post("reset", resume=False).status_code == 409
    assert box.post("reset").status_code == 200
    assert box.value(LEFT) == REBOOTED
    box.kill()


def test_a_reboot_ends_what_ignores_signals_and_what_forks(box: Box) -> None:
    box.run(
        "import subprocess\n"
        "for code in ('trap \"\" TERM INT HUP; while :; do sleep 1; done', 'while :; do (sleep 1 &); done'):\n"
        "    subprocess.Popen(['setsid', 'bash', '-c', code])"
    )
    assert box.post("reset").status_code == 200
    assert box.value("subprocess = __import__('subprocess'); subprocess.run(['pgrep', 'bash']).returncode") == "1"


def test_the_timeout_of_one_that_asked_for_it_keeps_files_only(engine: EngineProcess) -> None:
    box = engine.create(autoPause=True, autoPauseMemory=False, envVars={"GIVEN": "yes"})
    box.run(LIVE)
    box.post("timeout", timeout=0)
    deadline = time.monotonic() + PATIENCE
    while "pauseMode" not in box.info() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert box.info()["pauseMode"] == "filesystem"
    box.post("connect", timeout=600)
    assert box.value(LEFT) == REBOOTED
    box.kill()


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("verb", ["pause", "connect"])
def test_an_engine_killed_while_memory_is_dropped_loses_no_file(
    own_engine: EngineProcess, verb: str, seconds: float
) -> None:
    box = own_engine.create()
    box.run("open('/home/user/file', 'w').write('there')")
    if verb == "connect":
        box.post("pause")

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError):  # the engine dies under the request
            box.post(verb, memory=False, timeout=600)

    asking = threading.Thread(target=ask)
    asking.start()
    threading.Event().wait(seconds)
    own_engine.kill()
    asking.join()
    own_engine.start()

    answer = box.post("connect", timeout=600)
    assert answer.status_code in (200, 201), answer.text
    assert box.value("open('/home/user/file').read()") == "there"
    assert len(own_engine.containers()) == 1


def test_settings_that_contradict_each_other_are_refused(engine: EngineProcess) -> None:
    """PROTOCOL.md section 2.2, row 1."""
    with engine.http() as http:
        for body in (
            {"autoPauseMemory": False},
            {"autoPauseMemory": False, "autoPause": True, "autoResume": {"enabled": True}},
            {"timeout": 0},
            {"timeout": "60"},
            {"metadata": {"a": 1}},
            {"templateID": "no such!"},
        ):
            answer = http.post("/sandboxes", json={"templateID": "base", **body})
            assert answer.status_code == 400, body
            assert set(answer.json()) == {"code", "message"}
        assert http.post("/sandboxes", json={"timeout": 60}).status_code == 400
        assert http.post("/sandboxes", content=b"\xff{").status_code == 400
        volumes = {"templateID": "base", "volumeMounts": [{"name": "v", "path": "/v"}]}
        assert http.post("/v2/sandboxes", json=volumes).status_code == 403


def test_traffic_wakes_a_sandbox_that_asked_for_it(engine: EngineProcess) -> None:
    """PROTOCOL.md section 6: afterwards it lives for as long as it was created for, and 300 s at least."""
    box = engine.create(timeout=100, autoPause=True, autoResume={"enabled": True})
    box.run("kept = 'yes'")
    box.post("pause")
    assert box.info()["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}

    values: list[str] = []
    callers = [threading.Thread(target=lambda: values.append(box.value("kept"))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert values == ["yes"] * 3
    info = box.info()
    assert at(info, "endAt") - at(info, "startedAt") == timedelta(seconds=300)
    box.kill()


def test_traffic_wakes_neither_what_did_not_ask_for_it_nor_what_lost_its_memory(engine: EngineProcess) -> None:
    quiet = engine.create()
    rebooting = engine.create(autoPause=True, autoResume={"enabled": True})
    quiet.post("pause")
    rebooting.post("pause", memory=False)
    for box in (quiet, rebooting):
        with engine.http() as http:
            answer = http.post("/execute", json={"code": "1"}, headers=box.headers)
        assert answer.status_code == 502
        assert "was not found" in answer.json()["message"]
        assert box.info()["state"] == "paused"
        box.kill()


def test_ppios_metadata_asks_for_auto_resume_as_well(engine: EngineProcess) -> None:
    box = engine.create(autoPause=True, metadata={"auto_resume": "true"})
    assert box.info()["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}
    box.kill()


def test_a_resume_may_change_what_happens_at_the_timeout_and_a_connect_to_what_runs_does_not(box: Box) -> None:
    """PPIO's legacy SDK sends `autoPause: false` with each connect (PROTOCOL.md section 1.5)."""
    box.post("connect", timeout=600, autoPause=True)
    assert box.info()["lifecycle"]["onTimeout"] == "kill"
    box.post("pause")
    box.post("connect", timeout=600, autoPause=True)
    assert box.info()["lifecycle"]["onTimeout"] == "pause"


def test_no_run_is_longer_than_24_hours(two: EngineInside) -> None:
    """PROTOCOL.md section 6: clamped until then, and refused after."""
    box = two.create(timeout=24 * 3600, autoPause=True)
    last = at(box.info(), "startedAt") + timedelta(hours=24)
    two.ahead = timedelta(hours=23)
    assert box.post("timeout", timeout=7200).status_code == 204
    assert at(box.info(), "endAt") == last
    assert box.post("connect", timeout=3 * 3600).status_code == 200
    assert at(box.info(), "endAt") == last
    # Not the deadline's clock, which has yet to look: the call itself.
    two.ahead = timedelta(hours=24, seconds=1)
    for verb, body in (("timeout", {"timeout": 60}), ("connect", {"timeout": 60}), ("refreshes", {"duration": 60})):
        answer = box.post(verb, **body)
        assert answer.status_code == 400, verb
        assert answer.json()["message"].startswith("Max instance length exceeded")

    box.post("pause")
    box.post("connect", timeout=60)
    assert at(box.info(), "endAt") - at(box.info(), "startedAt") == timedelta(seconds=60)


def test_a_timeout_beyond_the_longest_is_refused_in_the_services_words(two: EngineInside) -> None:
    box = two.create()
    for verb in ("connect", "fork"):
        answer = box.post(verb, timeout=25 * 3600)
        assert answer.status_code == 400
        assert answer.json()["message"] == "Timeout cannot be greater than 24 hours"


def test_a_refresh_only_ever_extends(two: EngineInside) -> None:
    box = two.create(timeout=600)
    end = box.info()["endAt"]
    assert box.post("refreshes").status_code == 204
    assert box.post("refreshes", duration=60).status_code == 204
    assert box.info()["endAt"] == end
    assert box.post("refreshes", duration=3600).status_code == 204
    assert at(box.info(), "endAt") > datetime.fromisoformat(end)
    assert box.post("refreshes", duration=3601).status_code == 400
    box.post("pause")
    assert box.post("refreshes", duration=60).status_code == 404


def test_only_so_many_run_at_a_time_and_what_is_paused_does_not_count(two: EngineInside) -> None:
    first, second = two.create(), two.create()
    with two.http() as http:
        refused = http.post("/sandboxes", json={"templateID": "base"})
    assert refused.status_code == 429
    assert "2 that may" in refused.json()["message"]
    assert first.post("fork", count=2).status_code == 400
    (failed,) = first.post("fork", count=1).json()
    assert failed["error"]["code"] == 429

    first.post("pause")
    third = two.create()
    assert first.post("connect", timeout=60).status_code == 429
    assert first.info()["state"] == "paused"
    third.kill()
    assert first.post("connect", timeout=60).status_code == 201
    assert second.info()["state"] == "running"


def test_a_record_of_an_earlier_version_is_still_a_sandbox(own_engine: EngineProcess) -> None:
    box = own_engine.create(timeout=100, metadata={"owner": "ann"})
    box.run("kept = 'yes'")
    box.post("pause")
    own_engine.kill()
    path = own_engine.state / "sandboxes" / box.id / "record.json"
    old = (
        "id template template_name runsc state run snapshot snapshot_bytes started_at end_at auto_pause auto_resume"
        " secure token memory_mb metadata"
    )
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in old.split()})
    )
    own_engine.start()

    info = box.info()
    assert (info["state"], info["pauseMode"], info["metadata"]) == ("paused", "full", {"owner": "ann"})
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value("kept") == "yes"


def create_v2(engine: EngineProcess, key: str, **body: object) -> tuple[int, dict[str, Any]]:
    with engine.http() as http:
        answer = http.post(
            "/v2/sandboxes", json={"templateID": "base", **body}, headers={"Idempotency-Key": key}, timeout=60
        )
    return answer.status_code, answer.json()


def test_the_same_key_is_the_same_sandbox_also_for_the_next_engine(own_engine: EngineProcess) -> None:
    answers: list[tuple[int, dict[str, Any]]] = []
    callers = [threading.Thread(target=lambda: answers.append(create_v2(own_engine, "key-1"))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert [status for status, _ in answers] == [201] * 4
    assert len({grant["sandboxID"] for _, grant in answers}) == 1
    assert len(own_engine.containers()) == 1
    sandbox_id = answers[0][1]["sandboxID"]
    status, other = create_v2(own_engine, "key-1", metadata={"another": "request"})
    assert (status, other["error_code"]) == (422, "idempotency_request_mismatch")
    assert create_v2(own_engine, "Not A Key")[0] == 400

    own_engine.kill()
    own_engine.start()
    assert create_v2(own_engine, "key-1")[1]["sandboxID"] == sandbox_id
    with own_engine.http() as http:
        http.delete(f"/sandboxes/{sandbox_id}")
    status, gone = create_v2(own_engine, "key-1")
    assert (status, gone["error_code"]) == (409, "idempotency_outcome_unknown")


def test_a_create_that_failed_leaves_its_key_free(two: EngineInside) -> None:
    boxes = [two.create(), two.create()]
    assert create_v2(two, "key-2")[0] == 429
    boxes[0].kill()
    assert create_v2(two, "key-2")[0] == 201


@pytest.mark.soak
def test_a_runsc_that_may_write_its_image_in_any_order_is_not_read_along(
    two: EngineInside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of releases after the one that is pinned nobody knows how they write."""
    box = two.create()
    box.run("kept = 1")
    read_along: list[bool] = []
    call = runsc.Runsc._call

    async def watched(self: runsc.Runsc, container: Container, verb: str, *arguments: str) -> str:
        answer = await call(self, container, verb, *arguments)
        if verb == "checkpoint":
            read_along.append(any(two.state.glob("snapshots/*/.partial-*/*")))
        return answer

    monkeypatch.setattr(runsc.Runsc, "_call", watched)
    for last in (runsc._LAST_IN_ORDER, 0):
        monkeypatch.setattr(runsc, "_LAST_IN_ORDER", last)
        runsc._in_order.cache_clear()
        assert box.post("pause").status_code == 204
        assert box.post("connect", timeout=600).status_code == 201
        assert box.value("kept") == "1"
    runsc._in_order.cache_clear()

    assert read_along == [True, False]
    box.kill()


def test_a_pause_that_asks_for_a_healthy_guest_is_refused_where_it_is_silent(box: Box) -> None:
    """5 s of silence, as E2B's clients wait."""
    import os
    import signal

    pid = int(next((box.engine.state / "sandboxes" / box.id).glob("run-*/pid")).read_text())
    os.kill(pid, signal.SIGSTOP)
    answer = box.post("pause", requireHealthyGuest=True)
    os.kill(pid, signal.SIGCONT)
    assert answer.status_code == 503
    assert box.value("1 + 1") == "2"
    assert box.post("pause", requireHealthyGuest=True).status_code == 204
