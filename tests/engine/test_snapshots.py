"""Snapshots and forks: copies with memory, of a sandbox that runs on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import own_state
from tests.machine import Box, EngineProcess


@pytest.fixture
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create(metadata={"owner": "ann"})
    yield box
    box.kill()


def snapshots(engine: EngineProcess, **query: object) -> list[dict[str, object]]:
    with engine.http() as http:
        answer = http.get("/snapshots", params={key: str(value) for key, value in query.items()})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, object]] = answer.json()
    return found


def delete(engine: EngineProcess, snapshot_id: str) -> int:
    with engine.http() as http:
        return http.delete(f"/templates/{snapshot_id.replace(':', '%3A')}").status_code


def test_a_snapshot_makes_any_number_of_sandboxes_also_after_its_origin_is_gone(
    engine: EngineProcess, box: Box
) -> None:
    box.run("import os; kept = [1, 2]; open('/tmp/file', 'w').write('there'); pid = os.getpid()")
    taken = box.post("snapshots")
    assert taken.status_code == 201, taken.text
    assert box.value("kept.append(3) or kept") == "[1, 2, 3]"
    box.kill()

    copies = [engine.create(templateID=taken.json()["snapshotID"]) for _ in range(2)]
    for copy in copies:
        assert copy.value("kept, open('/tmp/file').read(), os.getpid() == pid") == "([1, 2], 'there', True)"
    assert len({box.id, *(copy.id for copy in copies)}) == 3
    assert len({box.token, *(copy.token for copy in copies)}) == 3
    assert copies[0].value("import random; random.random()") != copies[1].value("import random; random.random()")

    # A copy has a life of its own: what it was made from may go while it sleeps.
    copies[0].post("pause")
    assert delete(engine, taken.json()["snapshotID"]) == 204
    copies[0].post("connect", timeout=600)
    assert copies[0].value("kept") == "[1, 2]"
    for copy in copies:
        copy.kill()


def test_a_stream_goes_on_while_a_snapshot_is_taken(engine: EngineProcess, box: Box) -> None:
    with box.stream("import time\nfor n in range(40): print(n, flush=True); time.sleep(0.05)\n'end'") as events:
        next(events)
        taken = box.post("snapshots")
        rest = list(events)

    assert taken.status_code == 201
    printed = "".join(event["text"] for event in rest if event["type"] == "stdout").split()
    assert printed[-1] == "39"
    assert [event["text"] for event in rest if event["type"] == "result"] == ["end"]
    assert delete(engine, taken.json()["snapshotID"]) == 204


def test_the_newest_snapshot_of_a_name_is_what_the_name_means(engine: EngineProcess, box: Box) -> None:
    box.run("version = 1")
    first = box.post("snapshots", name="mine").json()
    box.run("version = 2")
    second = box.post("snapshots", name="mine").json()

    assert (first["names"], second["names"]) == (["mine:default"], ["mine:default"])
    assert [each["names"] for each in snapshots(engine, sandboxID=box.id)] == [["mine:default"], []]
    for reference, version in (("mine", "2"), (second["snapshotID"], "2"), (first["snapshotID"], "1")):
        copy = engine.create(templateID=reference)
        assert copy.value("version") == version
        assert copy.info()["templateID"] in (first["snapshotID"], second["snapshotID"])
        copy.kill()

    # With the newest gone the name falls back to the one before.
    assert delete(engine, "mine") == 204
    assert [each["snapshotID"] for each in snapshots(engine, name="mine")] == [first["snapshotID"]]
    assert delete(engine, first["snapshotID"]) == 204
    assert delete(engine, first["snapshotID"]) == 404
    with engine.http() as http:
        assert http.post("/sandboxes", json={"templateID": "mine"}).status_code == 404


def test_snapshots_are_listed_newest_first_and_in_pages(engine: EngineProcess, box: Box) -> None:
    ids = [box.post("snapshots").json()["snapshotID"] for _ in range(3)]
    with engine.http() as http:
        first = http.get("/snapshots", params={"sandboxID": box.id, "limit": 2})
        rest = http.get(
            "/snapshots", params={"sandboxID": box.id, "limit": 2, "nextToken": first.headers["X-Next-Token"]}
        )
    listed = [*first.json(), *rest.json()]
    assert [each["snapshotID"] for each in listed] == ids[::-1]
    assert all(each["sizeBytes"] > 1 << 20 for each in listed)
    assert "X-Next-Token" not in rest.headers
    for each in ids:
        assert delete(engine, each) == 204


def test_a_snapshot_without_memory_begins_as_after_a_reboot(engine: EngineProcess, box: Box) -> None:
    box.run("kept = 1; open('/tmp/file', 'w').write('there')")
    box.run("import subprocess; child = subprocess.Popen(['sleep', '1000'])")
    taken = box.post("snapshots", memory=False).json()

    assert box.value("kept, child.poll()") == "(1, None)"
    copy = engine.create(templateID=taken["snapshotID"])
    assert copy.value("'kept' in globals(), open('/tmp/file').read()") == "(False, 'there')"
    assert copy.value("import subprocess; subprocess.run(['pgrep', 'sleep']).returncode") == "1"
    copy.kill()
    delete(engine, taken["snapshotID"])


def test_a_fork_is_copies_with_memory_and_the_origin_runs_on(engine: EngineProcess, box: Box) -> None:
    box.run("kept = ['yes']")
    answer = box.post("fork", count=3, timeout=100)

    assert answer.status_code == 201, answer.text
    copies = [Box(engine, each["sandbox"]) for each in answer.json()]
    assert len({box.id, *(copy.id for copy in copies)}) == 4
    assert len({box.token, *(copy.token for copy in copies)}) == 4
    for number, copy in enumerate(copies):
        assert copy.value(f"kept.append({number}) or kept") == f"['yes', {number}]"
        assert copy.info()["metadata"] == {"owner": "ann"}
    assert box.value("kept") == "['yes']"
    with engine.http() as http:
        # One's token opens no other.
        headers = {**copies[0].headers, "X-Access-Token": box.token}
        assert http.post("/execute", json={"code": "1"}, headers=headers).status_code == 401
    for copy in copies:
        copy.kill()
    assert not [path for path in (engine.state / "saved").iterdir() if not (path / "snapshot.json").exists()]


def test_what_is_paused_is_neither_forked_nor_snapshot(engine: EngineProcess, box: Box) -> None:
    box.post("pause")
    for verb in ("fork", "snapshots"):
        answer = box.post(verb)
        assert answer.status_code == 409
        assert answer.json()["code"] == 409
    box.kill()
    assert box.post("fork").status_code == 404


def test_names_that_templates_have_or_that_are_none_are_refused(box: Box) -> None:
    for name in ("base", "code-interpreter-v1:v2", "../up", "a b", "", "ä"):
        assert box.post("snapshots", name=name).status_code == 400, name


def test_an_engine_killed_while_it_takes_a_snapshot_leaves_the_sandbox_and_no_rest(own_engine: EngineProcess) -> None:
    """Frozen by an engine that is no more, it is thawed by the next; half an image is swept."""
    box = own_engine.create()
    box.run("kept = 'yes'; blob = b'x' * (200 << 20)")
    whole = box.post("snapshots").json()["snapshotID"]
    for verb in ("snapshots", "fork"):
        asking = threading.Thread(target=lambda verb=verb: _ask(box, verb))
        asking.start()
        while not list((own_engine.state / "saved").glob(".partial-*/*")):
            assert asking.is_alive()
        own_engine.kill()
        asking.join()
        own_engine.start()

        assert box.value("kept, len(blob)") == f"('yes', {200 << 20})"
        assert [each["snapshotID"] for each in snapshots(own_engine)] == [whole]
        assert [path.name for path in (own_engine.state / "saved").iterdir()] == [whole.partition(":")[0]]

    copy = own_engine.create(templateID=whole)
    assert copy.value("kept") == "yes"


def test_a_caller_who_leaves_and_a_kill_in_between_leave_nothing_of_a_fork(own_engine: EngineProcess) -> None:
    box = own_engine.create()
    box.run("blob = b'x' * (100 << 20)")
    with own_engine.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post(f"/sandboxes/{box.id}/fork", json={"count": 2}, timeout=0.05)

    # It waits for the fork, which goes on without its caller.
    assert box.kill() == 204

    with own_engine.http() as http:
        rows = http.get("/v2/sandboxes").json()
    assert box.id not in {row["sandboxID"] for row in rows}
    for row in rows:
        with own_engine.http() as http:
            assert http.delete(f"/sandboxes/{row['sandboxID']}").status_code == 204


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a file system")
def test_a_full_disk_fails_a_snapshot_and_a_fork_and_the_sandbox_goes_on_undisturbed(templates: Path) -> None:
    with own_state() as state:
        for name in ("saved", "snapshots"):
            (state / name).mkdir()
        small = "".join(f"mount -t tmpfs -o size=24m none {state / name} && " for name in ("saved", "snapshots"))
        engine = EngineProcess(state, prefix=("unshare", "--mount", "sh", "-c", f'{small}exec "$@"', "sh")).start()
        try:
            box = engine.create()
            pid = box.value("import os; kept = 'yes'; open('/tmp/file', 'w').write('there'); os.getpid()")
            with box.stream("import time\nfor n in range(60): print(n, flush=True); time.sleep(0.1)") as events:
                next(events)
                for verb in ("snapshots", "fork", "snapshots"):
                    answer = box.post(verb)
                    assert answer.status_code == 500, answer.text
                    assert "no space" in answer.json()["message"].lower()
                assert "59\n" in "".join(event.get("text", "") for event in events)
            assert box.value("kept, os.getpid()") == f"('yes', {pid})"
            assert snapshots(engine) == []

            # Its memory was to go and is gone; that it could not be paused is said, and its files are there.
            answer = box.post("pause", memory=False)
            assert answer.status_code == 500
            assert "goes on running" in answer.json()["message"]
            assert box.value("open('/tmp/file').read()") == "there"
            assert box.kill() == 204
        finally:
            engine.stop()
        assert engine.containers() == []


def _ask(box: Box, verb: str) -> None:
    try:
        box.post(verb)
    except (httpx.TransportError, json.JSONDecodeError):
        return  # the engine died under it
