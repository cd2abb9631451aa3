"""Files and watches of a real sandbox: whose they are, and that they are there after a pause."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sandbox_tools.guest.envelopes import envelope
from tests.machine import Box, EngineProcess

OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    """One sandbox for the tests of this module, which leave each other's files alone."""
    box = engine.create()
    yield box
    box.kill()


def envd(box: Box) -> dict[str, str]:
    """What routes a request to envd."""
    return {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": "49983", "X-Access-Token": box.token}


def put(box: Box, path: str, content: bytes, headers: dict[str, str] | None = None, **query: str) -> httpx.Response:
    """An upload."""
    with box.engine.http() as http:
        return http.post(
            "/files",
            params={"path": path, **query},
            content=content,
            headers={**envd(box), **OCTETS, **(headers or {})},
        )


def get(box: Box, path: str, **query: str) -> httpx.Response:
    """A download."""
    with box.engine.http() as http:
        return http.get("/files", params={"path": path, **query}, headers=envd(box))


def call(box: Box, method: str, *, user: str = "", **message: Any) -> Any:
    """A method of the filesystem service; its answer, or the code of its error."""
    login = {"authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()} if user else {}
    with box.engine.http() as http:
        answer = http.post(f"/filesystem.Filesystem/{method}", json=message, headers={**envd(box), **login})
    return answer.json() if answer.status_code == 200 else answer.json()["code"]


@contextlib.contextmanager
def watching(box: Box, path: str, **more: Any) -> Iterator[Iterator[Any]]:
    """The messages of a watch that streams."""
    with (
        box.engine.http() as http,
        http.stream(
            "POST",
            "/filesystem.Filesystem/WatchDir",
            content=envelope({"path": path, **more}),
            headers={**envd(box), "content-type": "application/connect+json"},
        ) as answer,
    ):

        def messages() -> Iterator[Any]:
            data = b""
            for piece in answer.iter_bytes():
                data += piece
                while len(data) >= 5 and len(data) >= 5 + int.from_bytes(data[1:5]):
                    end = 5 + int.from_bytes(data[1:5])
                    yield json.loads(data[5:end])
                    data = data[end:]

        yield messages()


def test_files_and_new_parents_belong_to_who_wrote_them(box: Box) -> None:
    assert put(box, "mine/new/file", b"1").json()[0]["path"] == "/home/user/mine/new/file"
    assert put(box, "~/file", b"2", username="root").json()[0]["path"] == "/root/file"
    assert put(box, "/srv/deep/file", b"3", username="user").status_code == 200

    owners = {
        path: [
            (entry["owner"], entry["group"], entry["permissions"]) for entry in [call(box, "Stat", path=path)["entry"]]
        ]
        for path in ("mine", "mine/new", "mine/new/file", "/root/file", "/srv", "/srv/deep/file")
    }

    assert owners == {
        "mine": [("user", "user", "drwxr-xr-x")],
        "mine/new": [("user", "user", "drwxr-xr-x")],
        "mine/new/file": [("user", "user", "-rw-r--r--")],
        "/root/file": [("root", "root", "-rw-r--r--")],
        "/srv": [("root", "root", "drwxr-xr-x")],
        "/srv/deep/file": [("user", "user", "-rw-r--r--")],
    }
    assert put(box, "x", b"", username="nobody-of-this-name").status_code == 401
    assert call(box, "Stat", user="nobody-of-this-name", path="/") == "unauthenticated"
    assert call(box, "Stat", user="root", path="~")["entry"]["path"] == "/root"
    assert call(box, "MakeDir", user="root", path="made")["entry"]["owner"] == "root"


def test_what_code_writes_can_be_read_and_the_other_way_round(box: Box) -> None:
    data = hashlib.shake_256(b"a").digest(3_000_000)

    assert put(box, "data", data).status_code == 200
    code = "import hashlib; hashlib.sha256(open('/home/user/data', 'rb').read()).hexdigest()"
    assert box.value(code).strip("'") == hashlib.sha256(data).hexdigest()
    box.run("open('data', 'ab').write(b'more')")

    assert get(box, "data").content == data + b"more"
    assert get(box, "/proc/self/comm").text.strip()
    assert get(box, "/dev/null").status_code == 400


def test_a_file_of_the_template_can_be_replaced_in_one_sandbox_alone(engine: EngineProcess, box: Box) -> None:
    other = engine.create()
    before = get(box, "/etc/hosts").text

    assert put(box, "/etc/hosts", b"127.0.0.1 localhost mine\n", username="root").status_code == 200

    assert get(box, "/etc/hosts").text == "127.0.0.1 localhost mine\n"
    assert get(other, "/etc/hosts").text == before
    other.kill()


def test_a_user_that_code_has_made_is_known_at_once(box: Box) -> None:
    made = b"ann:x:1234:1234::/home/ann:/bin/bash\n"
    users = get(box, "/etc/passwd").content
    assert put(box, "/etc/passwd", users + made, username="root").status_code == 200

    assert put(box, "hers", b"", username="ann").json()[0]["path"] == "/home/ann/hers"
    assert call(box, "Stat", path="/home/ann/hers")["entry"]["owner"] == "ann"

    assert put(box, "/etc/passwd", b"", username="root").status_code == 200
    assert put(box, "file", b"", username="user").json()[0]["path"] == "/home/user/file"
    assert put(box, "file", b"", username="root").json()[0]["path"] == "/root/file"
    assert put(box, "file", b"", username="ann").status_code == 401
    assert put(box, "/etc/passwd", users, username="root").status_code == 200


def test_a_move_between_file_systems_keeps_owner_and_metadata(box: Box) -> None:
    """/dev/shm is another one than the root."""
    assert put(box, "tagged", b"text", {"X-Metadata-Author": "ann"}).status_code == 200

    moved = call(box, "Move", source="tagged", destination="/dev/shm/there/tagged")

    assert (moved["entry"]["owner"], moved["entry"]["metadata"]) == ("user", {"author": "ann"})
    assert call(box, "Stat", path="tagged") == "not_found"


def test_files_metadata_and_watchers_are_kept_over_a_pause(box: Box) -> None:
    """What a watcher had not been asked for yet, it tells afterwards; and it goes on watching."""
    assert put(box, "kept/file", b"text", {"X-Metadata-Author": "ann"}).status_code == 200
    number = call(box, "CreateWatcher", path="kept", recursive=True)["watcherId"]
    assert put(box, "kept/before", b"").status_code == 200

    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201

    assert put(box, "kept/sub/after", b"1").status_code == 200
    events = call(box, "GetWatcherEvents", watcherId=number)["events"]
    assert [event["name"] for event in events if event["type"] == "EVENT_TYPE_CREATE"] == ["before", "sub", "sub/after"]
    assert get(box, "kept/file").text == "text"
    assert call(box, "Stat", path="kept/file")["entry"]["metadata"] == {"author": "ann"}
    assert call(box, "RemoveWatcher", watcherId=number) == {}


def test_a_watch_that_streams_breaks_off_at_a_pause_and_can_be_had_again(box: Box) -> None:
    assert call(box, "MakeDir", path="streamed")["entry"]
    with watching(box, "streamed") as messages:
        assert next(messages) == {"start": {}}
        assert put(box, "streamed/a", b"1").status_code == 200
        assert next(messages) == {"filesystem": {"name": "a", "type": "EVENT_TYPE_CREATE"}}
        assert box.post("pause").status_code == 204
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in messages:
                pass
    assert box.post("connect", timeout=600).status_code == 201

    with watching(box, "streamed", includeEntry=True) as messages:
        assert next(messages) == {"start": {}}
        box.run("open('streamed/b', 'w').write('text')")
        event = next(messages)["filesystem"]
        assert (event["name"], event["type"], event["entry"]["owner"]) == ("b", "EVENT_TYPE_CREATE", "user")


def test_an_upload_that_a_pause_breaks_off_leaves_the_old_file(box: Box) -> None:
    assert put(box, "whole/file", b"before").status_code == 200

    def half() -> Iterator[bytes]:
        yield bytes(1 << 20)
        while not [e for e in call(box, "ListDir", path="whole")["entries"] if e["name"].startswith(".upload-")]:
            yield b"more"
        assert box.post("pause").status_code == 204
        raise EOFError

    with box.engine.http() as http, pytest.raises(EOFError):
        http.post("/files", params={"path": "whole/file"}, content=half(), headers={**envd(box), **OCTETS})
    assert box.post("connect", timeout=600).status_code == 201

    assert get(box, "whole/file").text == "before"
    for _ in range(500):  # its server learns of the break once it runs again
        if (names := [entry["name"] for entry in call(box, "ListDir", path="whole")["entries"]]) == ["file"]:
            break
    assert names == ["file"]
