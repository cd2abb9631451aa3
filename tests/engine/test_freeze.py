"""Frozen: no CPU, its RAM held, and never in the way of whoever comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandbox_tools.engine import usage
from sandbox_tools.engine.kept import KEPT
from sandbox_tools.guest.envelopes import envelope
from tests.conftest import running_engine
from tests.engine.inside import EngineInside, engine_inside
from tests.engine.servers import APPLICATION
from tests.engine.test_commands import TERMINAL, Commands
from tests.engine.test_states import COUNTER
from tests.engine.test_websocket import connect
from tests.machine import PATIENCE, Box, EngineProcess
from tests.rpc import STREAM, bash


@pytest.fixture
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


@pytest.fixture(scope="module")
def serving(engine: EngineProcess) -> Iterator[Box]:
    """A sandbox with servers inside."""
    box = engine.create()
    box.run(APPLICATION)
    box.run("kept = 'yes'")
    yield box
    box.kill()


@pytest.fixture(scope="module")
def inside(templates: Path) -> Iterator[EngineInside]:
    """An engine with a clock that can be put forward, and room for two sandboxes."""
    with engine_inside(templates, max_sandboxes=2) as engine:
        yield engine


def freeze(box: Box) -> None:
    """Freeze it, which must succeed."""
    answer = box.post("freeze")
    assert answer.status_code == 204, answer.text
    assert is_frozen(box)


def is_frozen(box: Box) -> bool:
    info = box.info()
    assert info["state"] == "running"
    return "frozenSince" in info


def process(box: Box) -> int:
    """The sandbox's process on the host."""
    return int(next((box.engine.state / "sandboxes" / box.id).glob("run-*/pid")).read_text())


def test_a_frozen_sandbox_takes_no_cpu_holds_its_memory_and_goes_on_where_it_was(box: Box) -> None:
    pid = box.value(COUNTER)
    box.run("blob = b'x' * (100 << 20)")
    before = int(box.value("int(open('/home/user/count').read())"))
    freeze(box)

    taken = usage.cpu_seconds(process(box))
    threading.Event().wait(2.0)  # 200 counts, were it awake
    assert usage.cpu_seconds(process(box)) == taken
    assert box.info()["residentBytes"] > 100 << 20

    after = int(box.value("int(open('/home/user/count').read())"))
    assert before < after < before + 150
    assert box.value("counter.poll() is None and counter.pid, len(blob)") == f"({pid}, {100 << 20})"


def over_http(box: Box) -> None:
    with box.engine.http() as http:
        assert http.get("/", headers={"Host": f"8000-{box.id}.localhost"}).status_code == 200


def over_a_websocket(box: Box) -> None:
    with connect(box) as talk:
        talk.send("there?")
        assert talk.recv(PATIENCE) == "there?"


def by_a_command(box: Box) -> None:
    assert Commands(box).run("echo there").stdout == b"there\n"


def by_a_file(box: Box) -> None:
    with box.engine.http() as http:
        headers = {**box.headers, "E2b-Sandbox-Port": "49983"}
        answer = http.post("/files", params={"path": "/home/user/a"}, files={"file": ("a", b"there")}, headers=headers)
    assert answer.status_code == 200


def by_code(box: Box) -> None:
    assert box.value("kept") == "yes"


def by_connecting(box: Box) -> None:
    assert box.post("connect", timeout=600).status_code == 200


def by_resuming(box: Box) -> None:
    """It ran all the time, but to whoever resumes it that is the answer to wish for."""
    assert box.post("resume", timeout=600).status_code == 201
    assert box.post("resume", timeout=600).status_code == 409


REACHING = [over_http, over_a_websocket, by_a_command, by_a_file, by_code, by_connecting, by_resuming]


@pytest.mark.parametrize("reach", REACHING, ids=lambda reach: str(reach.__name__))
def test_whoever_reaches_a_frozen_sandbox_thaws_it(serving: Box, reach: Callable[[Box], None]) -> None:
    freeze(serving)
    reach(serving)

    assert not is_frozen(serving)
    assert serving.value("kept") == "yes"


def test_looking_at_a_frozen_sandbox_moving_its_end_and_copying_it_leave_it_frozen(box: Box) -> None:
    """Its metrics are the host's: no CPU, and the memory that it holds."""
    box.run("kept = 'yes'")
    freeze(box)
    since = box.info()["frozenSince"]
    end = box.info()["endAt"]

    assert box.post("freeze").status_code == 204
    assert box.post("timeout", timeout=1000).status_code == 204
    assert box.post("refreshes", duration=2000).status_code == 204
    assert box.info()["endAt"] > end
    with box.engine.http() as http:
        rows = {row["sandboxID"]: row for row in http.get("/v2/sandboxes", params={"state": "running"}).json()}
        samples = http.get(f"/sandboxes/{box.id}/metrics").json()
        lines = http.get(f"/sandboxes/{box.id}/logs").json()["logs"]
    assert rows[box.id]["frozenSince"] == since
    assert samples[-1]["memUsed"] > 0
    assert [line["line"] for line in lines][-1] == "frozen"

    snapshot = box.post("snapshots").json()["snapshotID"]
    (fork,) = box.post("fork").json()
    made = [Box(box.engine, fork["sandbox"]), box.engine.create(templateID=snapshot)]
    assert box.info()["frozenSince"] == since
    for each in made:
        assert not is_frozen(each)
        assert each.value("kept") == "yes"
        each.kill()
    with box.engine.http() as http:
        http.delete(f"/templates/{snapshot}")
    assert box.value("kept") == "yes"


@pytest.mark.parametrize(
    ("body", "left"), [({}, "True"), ({"requireHealthyGuest": True}, "True"), ({"memory": False}, "False")]
)
def test_a_frozen_sandbox_is_paused_like_any_other(box: Box, body: dict[str, Any], left: str) -> None:
    box.run("kept = 'yes'; open('/home/user/file', 'w').write('there')")
    freeze(box)

    assert box.post("pause", **body).status_code == 204
    info = box.info()
    assert (info["state"], "frozenSince" in info) == ("paused", False)
    assert box.post("freeze").status_code == 409
    assert box.info()["state"] == "paused"

    assert box.post("connect", timeout=600).status_code == 201
    assert not is_frozen(box)
    assert box.value("open('/home/user/file').read(), 'kept' in globals()") == f"('there', {left})"


def test_a_frozen_sandbox_is_rebooted_and_killed_like_any_other(box: Box) -> None:
    box.run("kept = 'yes'")
    freeze(box)
    assert box.post("reset").status_code == 200
    assert box.value("'kept' in globals()") == "False"

    freeze(box)
    assert box.kill() == 204
    assert box.post("freeze").status_code == 404
    assert not [name for name in box.engine.containers() if name.startswith(box.id)]


@contextlib.contextmanager
def code(box: Box) -> Iterator[None]:
    with box.stream("import time; print('begun', flush=True); time.sleep(600)") as events:
        next(event for event in events if event["type"] == "stdout")
        yield


@contextlib.contextmanager
def talk(box: Box) -> Iterator[None]:
    with connect(box):
        yield


@contextlib.contextmanager
def command(box: Box) -> Iterator[None]:
    with Commands(box).stream("Start", bash("echo begun; sleep 600")) as stream:
        stream.until(lambda seen: b"begun" in seen.stdout)
        yield
        Commands(box).call("SendSignal", {"process": {"pid": stream.seen.pid}, "signal": "SIGNAL_SIGKILL"})


@contextlib.contextmanager
def terminal(box: Box) -> Iterator[None]:
    with Commands(box).stream("Start", TERMINAL) as stream:
        stream.until(lambda seen: bool(seen.pty))
        yield
        Commands(box).call("SendSignal", {"process": {"pid": stream.seen.pid}, "signal": "SIGNAL_SIGKILL"})


@contextlib.contextmanager
def watch(box: Box) -> Iterator[None]:
    headers = {**STREAM, **box.headers, "E2b-Sandbox-Port": "49983"}
    content = envelope({"path": "/home/user"})
    with (
        box.engine.http() as http,
        http.stream("POST", "/filesystem.Filesystem/WatchDir", content=content, headers=headers) as answer,
    ):
        pieces = answer.iter_bytes()
        assert b"start" in next(pieces)
        yield


@pytest.mark.parametrize("use", [code, talk, command, terminal, watch], ids=lambda use: str(use.__name__))
def test_a_sandbox_that_somebody_is_connected_to_is_not_frozen_under_them(
    serving: Box, use: Callable[[Box], contextlib.AbstractContextManager[None]]
) -> None:
    with use(serving):
        answer = serving.post("freeze")
        assert answer.status_code == 409
        assert "is in use: connections are open (port " in answer.json()["message"]
        assert not is_frozen(serving)

    deadline = time.monotonic() + PATIENCE
    while (answer := serving.post("freeze")).status_code != 204 and time.monotonic() < deadline:
        assert answer.status_code == 409
    assert is_frozen(serving)
    assert serving.value("kept") == "yes"


@pytest.mark.soak
def test_code_that_was_left_before_the_freeze_is_interrupted_after_it_and_keeps_its_variables(box: Box) -> None:
    """The guest counts the time it is given, not the clock's, so a freeze longer than its patience ends nothing."""
    box.run("kept = 'yes'")
    with box.stream("while True: pass") as events:
        next(events)
    deadline = time.monotonic() + PATIENCE
    while box.post("freeze").status_code != 204 and time.monotonic() < deadline:
        pass
    threading.Event().wait(12.0)  # the guest gives up after ten

    assert box.value("kept") == "yes"


def test_a_connection_that_is_kept_inside_neither_prevents_a_freeze_nor_suffers_from_it(serving: Box) -> None:
    for seconds in (0.0, 2 * KEPT):
        over_http(serving)
        freeze(serving)
        threading.Event().wait(seconds)
        over_http(serving)


def test_freezing_and_using_a_sandbox_at_once_keeps_nobody_waiting_and_loses_nothing(box: Box) -> None:
    box.run("import threading; count = 0; lock = threading.Lock()")
    statuses: list[int] = []
    values: list[str] = []
    stop = threading.Event()

    def freezing() -> None:
        while not stop.is_set():
            statuses.append(box.post("freeze").status_code)

    def using() -> None:
        for _ in range(15):
            box.run("with lock: count += 1")
            values.append(box.value("1 + 1"))

    freezers = [threading.Thread(target=freezing) for _ in range(2)]
    users = [threading.Thread(target=using) for _ in range(3)]
    for each in (*freezers, *users):
        each.start()
    for user in users:
        user.join()
    stop.set()
    for each in freezers:
        each.join()

    assert set(statuses) <= {204, 409}
    assert statuses.count(204) > 1
    assert values == ["2"] * 45
    assert box.value("count") == "45"


def test_a_freeze_between_the_thaw_for_a_request_and_the_request_itself_is_undone(inside: EngineInside) -> None:
    """Nothing is sent into a sandbox that stands still: it would wait for whoever comes next."""
    box = inside.create()
    freeze(box)
    supervisor = inside.supervisor
    entry = supervisor.entry(box.id)

    async def request() -> bool:
        return (await supervisor.for_traffic(box.id)).awake

    async def at_once() -> bool:
        async with entry.lock:
            asked = asyncio.create_task(request())
            while len(entry.lock._waiters or ()) < 1:
                await asyncio.sleep(0)
            freezing = asyncio.create_task(supervisor.freeze(box.id))
            while len(entry.lock._waiters or ()) < 2:
                await asyncio.sleep(0)
        await freezing
        return await asked

    assert inside.do(at_once())
    box.kill()


def test_a_freeze_and_a_pause_at_once_end_in_a_pause(box: Box) -> None:
    box.run("kept = 'yes'; blob = b'x' * (100 << 20)")
    for wait in (0.0, 0.01, 0.05, 0.2):
        answers: dict[str, int] = {}

        def ask(verb: str, seconds: float, answers: dict[str, int] = answers) -> None:
            threading.Event().wait(seconds)
            answers[verb] = box.post(verb).status_code

        asking = [threading.Thread(target=ask, args=each) for each in (("pause", 0.01), ("freeze", wait))]
        for each in asking:
            each.start()
        for each in asking:
            each.join()
        assert answers["pause"] == 204
        assert answers["freeze"] in (204, 409)
        assert box.info()["state"] == "paused"
        assert box.post("connect", timeout=600).status_code == 201
        assert box.value("kept") == "yes"


def test_a_timeout_that_is_reached_while_frozen_pauses_or_kills(engine: EngineProcess) -> None:
    for auto_pause in (True, False):
        box = engine.create(autoPause=auto_pause)
        box.run("kept = 'yes'")
        freeze(box)
        box.post("timeout", timeout=1)
        if auto_pause:
            box.wait_for("paused")
            box.post("connect", timeout=600)
            assert box.value("kept") == "yes"
            box.kill()
        else:
            assert "timeout was reached" in box.wait_gone()


def test_a_frozen_sandbox_counts_as_running_since_its_memory_is_held(inside: EngineInside) -> None:
    boxes = [inside.create(), inside.create()]
    for box in boxes:
        freeze(box)
    with inside.http() as http:
        assert http.post("/sandboxes", json={"templateID": "base"}).status_code == 429
    for box in boxes:
        assert box.post("connect", timeout=600).status_code == 200
        box.kill()


def test_it_is_known_how_long_a_sandbox_ran_stood_still_and_slept(inside: EngineInside) -> None:
    box = inside.create(timeout=24 * 3600)
    spent = {"running": 100, "frozen": 1000, "paused": 10000}

    def later(seconds: int) -> None:
        inside.ahead += timedelta(seconds=seconds)

    for _ in range(2):
        later(50)
        freeze(box)
        later(400)
        assert datetime.fromisoformat(box.info()["frozenSince"]) <= inside.now() - timedelta(seconds=400)
        by_connecting(box)
        freeze(box)
        later(100)
        box.post("pause")
        later(5000)
        box.post("connect", timeout=24 * 3600)

    real = box.info()["spent"]
    assert {name: seconds // 50 * 50 for name, seconds in real.items()} == spent
    (fork,) = box.post("fork").json()
    copy = Box(inside, fork["sandbox"])
    assert sum(copy.info()["spent"].values()) < 50
    for each in (box, copy):
        each.kill()


def test_an_engine_does_not_exit_while_a_sandbox_is_frozen(templates: Path) -> None:
    with running_engine("--idle-exit", "0.5") as engine:
        box = engine.create()
        freeze(box)
        threading.Event().wait(2.0)
        assert engine.process is not None
        assert engine.process.poll() is None
        assert is_frozen(box)


def test_a_frozen_sandbox_outlives_a_killed_engine_and_stays_frozen(own_engine: EngineProcess) -> None:
    box = own_engine.create()
    box.run("kept = 'yes'")
    freeze(box)
    since = box.info()["frozenSince"]

    own_engine.kill()
    own_engine.start()

    assert box.info()["frozenSince"] == since
    assert box.value("kept") == "yes"
    assert not is_frozen(box)

    # The next one that freezes it, and one that pauses what it has found frozen.
    freeze(box)
    own_engine.kill()
    own_engine.start()
    assert box.post("pause").status_code == 204
    box.post("connect", timeout=600)
    assert box.value("kept") == "yes"


def test_an_engine_that_is_told_to_stop_pauses_what_is_frozen(own_engine: EngineProcess) -> None:
    box = own_engine.create()
    box.run("kept = 'yes'")
    freeze(box)

    assert own_engine.stop() == 0

    assert own_engine.containers() == []
    own_engine.start()
    assert box.info()["state"] == "paused"
    box.post("connect", timeout=600)
    assert box.value("kept") == "yes"


@pytest.mark.parametrize("verb", ["freeze", "connect", "pause", "snapshots"])
def test_an_engine_killed_in_the_middle_of_what_it_does_to_a_frozen_sandbox_loses_nothing(
    own_engine: EngineProcess, verb: str
) -> None:
    box = own_engine.create()
    box.run("kept = 'yes'")
    for seconds in (0.002, 0.01, 0.02, 0.04, 0.1):
        if verb != "freeze":
            freeze(box)

        def ask() -> None:
            with contextlib.suppress(httpx.TransportError):  # the engine dies under the request
                box.post(verb, **({"timeout": 600} if verb == "connect" else {}))

        asking = threading.Thread(target=ask)
        asking.start()
        threading.Event().wait(seconds)
        own_engine.kill()
        asking.join()
        own_engine.start()
        assert box.post("connect", timeout=600).status_code in (200, 201)
        assert box.value("kept") == "yes"
        assert len(own_engine.containers()) == 1


def test_a_frozen_sandbox_whose_process_dies_is_reported_lost(box: Box) -> None:
    freeze(box)
    os.kill(process(box), signal.SIGKILL)

    assert "ended by itself" in box.wait_gone()
