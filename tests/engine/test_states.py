"""Running, paused, gone: what the engine promises of each, over the wire."""

from __future__ import annotations

import threading
import time
from datetime import datetime

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.machine import Box, EngineProcess

COUNTER = """
import os, subprocess, sys, time
open('/home/user/count.py', 'w').write('''
import os, time
n = 0
while True:
    n += 1
    open('/home/user/new', 'w').write(str(n))
    os.replace('/home/user/new', '/home/user/count')
    time.sleep(0.01)
''')
counter = subprocess.Popen([sys.executable, '/home/user/count.py'])
while not os.path.exists('/home/user/count'):
    time.sleep(0.01)
counter.pid
"""


@pytest.fixture
def box(engine: EngineProcess):  # type: ignore[no-untyped-def]
    box = engine.create()
    yield box
    box.kill()


def test_a_resumed_sandbox_has_its_variables_files_and_processes(box: Box) -> None:
    """The promise of the whole project: memory, files and processes are where they were."""
    pid = box.value(COUNTER)
    box.run("import pandas; frame = pandas.DataFrame({'a': [1, 2, 3]}); open('/home/user/note', 'w').write('kept')")

    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201

    assert box.value("int(frame.a.sum())") == "6"
    assert box.value("open('/home/user/note').read()") == "kept"
    assert box.value("counter.poll() is None and counter.pid") == pid


def test_a_background_process_stands_still_while_its_sandbox_is_paused(box: Box) -> None:
    box.run(COUNTER)
    # Read before and after by the sandbox's own clock, which does stop, and by the count, which can't lie.
    before = int(box.value("int(open('/home/user/count').read())"))
    box.post("pause")
    asleep = threading.Event()
    asleep.wait(2.0)  # 200 counts, were it awake
    box.post("connect", timeout=600)

    after = int(box.value("int(open('/home/user/count').read())"))
    assert before < after < before + 150


def test_a_paused_sandbox_holds_no_memory_and_no_process(box: Box) -> None:
    box.run("blob = b'x' * (100 << 20)")
    assert box.info()["residentBytes"] > 100 << 20

    box.post("pause")

    info = box.info()
    assert (info["state"], info["residentBytes"]) == ("paused", 0)
    assert info["snapshotBytes"] > 0
    box.wait_for_no_process()


def test_pausing_twice_is_a_conflict_and_joining_a_pause_is_not(box: Box) -> None:
    """PROTOCOL.md section 6: a pause during a pause gets 204, a pause after it 409."""
    box.run("blob = b'x' * (300 << 20)")
    statuses: list[int] = []
    callers = [threading.Thread(target=lambda: statuses.append(box.post("pause").status_code)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert statuses == [204, 204]
    again = box.post("pause")
    assert again.status_code == 409
    assert "already paused" in again.json()["message"]


def pausing(box: Box) -> threading.Thread:
    """A pause under way, which gets its 204."""
    statuses: list[int] = []

    def pause() -> None:
        statuses.append(box.post("pause").status_code)
        assert statuses == [204]

    caller = threading.Thread(target=pause)
    caller.start()
    while box.info()["state"] != "paused" and not statuses:  # shown from the moment the pause begins
        pass
    assert not statuses
    return caller


def test_connect_during_a_pause_has_the_sandbox_back_from_memory(box: Box) -> None:
    box.run("import os; kept = 'yes'; blob = os.urandom(400 << 20)")
    caller = pausing(box)

    answer = box.post("connect", timeout=600)
    caller.join()

    assert answer.status_code == 200  # it was never gone
    assert box.info()["state"] == "running"
    assert box.value("kept, len(blob)") == f"('yes', {400 << 20})"
    assert box.info()["snapshotBytes"] == 0
    # It is paused and resumed like any other afterwards.
    assert box.post("pause").status_code == 204
    assert not list((box.engine.state / "snapshots" / box.id).glob(".partial-*"))
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value("kept") == "yes"


def test_a_pause_is_not_given_up_for_who_wants_something_changed_by_the_resume(box: Box) -> None:
    box.run("kept = 'yes'; blob = b'x' * (200 << 20)")
    caller = pausing(box)

    answer = box.post("connect", timeout=600, memory=False)
    caller.join()

    assert answer.status_code == 201
    assert box.run("kept")[-1]["type"] != "result"  # as after a reboot


def test_a_kill_during_a_pause_leaves_nothing(box: Box) -> None:
    box.run("blob = b'x' * (400 << 20)")
    caller = pausing(box)

    assert box.kill() == 204
    caller.join()

    assert not (box.engine.state / "snapshots" / box.id).exists()
    assert not [name for name in box.engine.containers() if name.startswith(box.id)]


def test_connect_extends_the_end_of_a_running_sandbox_and_never_shortens_it(box: Box) -> None:
    end = box.info()["endAt"]

    assert box.post("connect", timeout=10).status_code == 200
    assert box.info()["endAt"] == end

    assert box.post("connect", timeout=3000).status_code == 200
    assert datetime.fromisoformat(box.info()["endAt"]) > datetime.fromisoformat(end)


def test_the_token_of_a_sandbox_survives_its_pauses(box: Box) -> None:
    box.post("pause")
    assert box.post("connect", timeout=600).json()["envdAccessToken"] == box.token


def test_code_is_refused_without_the_token_of_the_sandbox(box: Box) -> None:
    box.token = "somebody else's"
    with box.engine.http() as http:
        body = {"code": "1", "context_id": None, "language": None, "env_vars": None}
        assert http.post("/execute", json=body, headers=box.headers).status_code == 401


def test_nobody_outside_tells_a_sandbox_whose_it_is(box: Box) -> None:
    """PROTOCOL.md section 3.5: envd's internal routes are not found through the gateway."""
    headers = {**box.headers, "E2b-Sandbox-Port": "49983"}
    with box.engine.http() as http:
        assert http.get("/health", headers=headers).status_code == 204
        assert http.post("/init", json={"accessToken": "mine"}, headers=headers).status_code == 404
    assert box.value("1 + 1") == "2"


def test_code_inside_cannot_give_its_sandbox_another_token(box: Box) -> None:
    """With a token of its own choice it could act as root in there, and lock out the engine."""
    inside = """
import http.client, json
connection = http.client.HTTPConnection('127.0.0.1', 49983)
connection.request('POST', '/init', json.dumps({'accessToken': 'mine'}))
connection.getresponse().status
"""
    assert box.value(inside) == "401"
    assert box.value("1 + 1") == "2"


def test_a_port_nobody_listens_on_and_a_sandbox_that_sleeps_are_told_apart(box: Box) -> None:
    """PROTOCOL.md section 3.5: the two bodies that E2B's SDKs look into."""
    headers = {**box.headers, "E2b-Sandbox-Port": "1234"}
    with box.engine.http() as http:
        closed = http.get("/", headers=headers)
        box.post("pause")
        asleep = http.get("/", headers=headers)

    assert (closed.status_code, asleep.status_code) == (502, 502)
    assert "port is not open" in closed.json()["message"]
    assert "was not found" in asleep.json()["message"]


def test_a_server_in_the_sandbox_is_reached_through_its_host_name(box: Box) -> None:
    box.run("import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'http.server', '8000'])")
    host = {"Host": f"8000-{box.id}.sandbox.test"}
    with box.engine.http() as http:
        deadline = time.monotonic() + 20
        while (answer := http.get("/", headers=host)).status_code != 200 and time.monotonic() < deadline:
            pass
    assert "Directory listing" in answer.text


def test_a_timeout_pauses_a_sandbox_that_asked_for_it(engine: EngineProcess) -> None:
    """What saves the state where a client was killed before it could pause."""
    box = engine.create(autoPause=True)
    box.run("kept = 'yes'")
    assert box.post("timeout", timeout=1).status_code == 204

    box.wait_for("paused")

    box.post("connect", timeout=600)
    assert box.value("kept") == "yes"
    box.kill()


def test_a_timeout_kills_a_sandbox_that_asked_for_nothing(engine: EngineProcess) -> None:
    box = engine.create()
    box.post("timeout", timeout=0)

    assert "timeout was reached" in box.wait_gone()


def test_a_killed_sandbox_is_gone_whether_it_ran_or_slept(engine: EngineProcess) -> None:
    for paused in (False, True):
        box = engine.create()
        if paused:
            box.post("pause")

        assert box.kill() == 204

        assert box.kill() == 404
        assert "it was killed" in box.post("connect", timeout=5).json()["message"]
        assert not (engine.state / "snapshots" / box.id).exists()
        assert not (engine.state / "sandboxes" / box.id).exists()


def test_timeouts_out_of_range_are_refused_before_anything_is_started(own_engine: EngineProcess) -> None:
    with own_engine.http() as http:
        for timeout in (0, -1, 25 * 3600, "soon"):
            answer = http.post("/sandboxes", json={"templateID": "base", "timeout": timeout})
            assert answer.status_code == 400
            assert answer.json()["code"] == 400
        assert http.post("/sandboxes", json={"templateID": "windows"}).status_code == 404
        assert http.get("/v2/sandboxes").json() == []
    assert own_engine.containers() == []


def test_setting_the_timeout_of_a_paused_sandbox_is_not_found(box: Box) -> None:
    """PROTOCOL.md section 2.2, row 10."""
    box.post("pause")
    assert box.post("timeout", timeout=60).status_code == 404


def test_a_listing_is_filtered_and_cut_into_pages(own_engine: EngineProcess) -> None:
    boxes = [own_engine.create(metadata={"owner": owner, "v&=/é": "1"}) for owner in ("ann", "ann", "bob")]
    boxes[0].post("pause")

    with own_engine.http() as http:
        paused = http.get("/v2/sandboxes", params={"state": "paused"}).json()
        # As the vendors' SDKs encode it: PROTOCOL.md section 2.3.
        ann = http.get("/v2/sandboxes?metadata=owner%3Dann%26v%252526%25253D%252F%2525C3%2525A9%3D1").json()
        first = http.get("/v2/sandboxes", params={"limit": 2})
        token = first.headers["X-Next-Token"]
        boxes[2].kill()  # the page is right although a sandbox before it went
        second = http.get("/v2/sandboxes", params={"limit": 2, "nextToken": token})
        bad = http.get("/v2/sandboxes", params={"nextToken": "?"})

    assert [row["sandboxID"] for row in paused] == [boxes[0].id]
    assert {row["sandboxID"] for row in ann} == {boxes[0].id, boxes[1].id}
    assert [row["sandboxID"] for row in first.json()] == [boxes[2].id, boxes[1].id]
    assert [row["sandboxID"] for row in second.json()] == [boxes[0].id]
    assert "X-Next-Token" not in second.headers
    assert bad.status_code == 400
    for box in boxes[:2]:
        box.kill()


def test_sandboxes_from_one_image_share_no_random_numbers(engine: EngineProcess) -> None:
    first, second = engine.create(), engine.create()
    numbers = "import random, numpy; (random.random(), float(numpy.random.rand()))"

    assert first.value(numbers) != second.value(numbers)

    first.kill()
    second.kill()


# What a sandbox may be told to do, by the state that it is in.
ANSWERS = {
    ("freeze", "running"): (204, "frozen"),
    ("freeze", "frozen"): (204, "frozen"),
    ("freeze", "paused"): (409, "paused"),
    ("connect", "running"): (200, "running"),
    ("connect", "frozen"): (200, "running"),
    ("connect", "paused"): (201, "running"),
    ("resume", "running"): (409, "running"),
    ("resume", "frozen"): (201, "running"),
    ("resume", "paused"): (201, "running"),
    ("pause", "running"): (204, "paused"),
    ("pause", "frozen"): (204, "paused"),
    ("pause", "paused"): (409, "paused"),
    ("timeout", "running"): (204, "running"),
    ("timeout", "frozen"): (204, "frozen"),
    ("timeout", "paused"): (404, "paused"),
}


class OneSandbox(RuleBasedStateMachine):
    """Any order of verbs, engines' deaths among them: the state is the one that is expected, and nothing is lost."""

    engine: EngineProcess

    def __init__(self) -> None:
        super().__init__()
        self.box = self.engine.create()
        self.box.run("count = 0")
        self.state = "running"
        self.count = 0

    @rule(verb=st.sampled_from(["freeze", "freeze", "connect", "resume", "pause", "timeout"]))
    def tell(self, verb: str) -> None:
        body = {} if verb in ("freeze", "pause") else {"timeout": 600}
        status, self.state = ANSWERS[verb, self.state]
        assert self.box.post(verb, **body).status_code == status

    @rule()
    def run_code(self) -> None:
        if self.state == "paused":
            with pytest.raises(httpx.RemoteProtocolError, match="was not found"):
                self.box.run("count += 1")
            return

        self.count += 1
        self.state = "running"
        assert self.box.value("count += 1; count") == str(self.count)

    @rule()
    def lose_the_engine(self) -> None:
        self.engine.kill()
        self.engine.start()

    @invariant()
    def it_is_what_is_expected(self) -> None:
        info = self.box.info()
        shown = "frozen" if "frozenSince" in info else info["state"]
        assert shown == self.state
        assert bool(info["residentBytes"]) == (self.state != "paused")

    def teardown(self) -> None:
        self.box.post("connect", timeout=600)
        assert self.box.value("count") == str(self.count)
        self.box.kill()


def test_whatever_it_is_told_in_whatever_order_a_sandbox_is_in_the_state_that_is_expected(
    own_engine: EngineProcess,
) -> None:
    OneSandbox.engine = own_engine
    quiet = settings(max_examples=4, stateful_step_count=12, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(OneSandbox, settings=quiet)  # type: ignore[no-untyped-call]
