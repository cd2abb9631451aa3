"""The ports of a sandbox, as the whole world's HTTP clients and servers use them, through a real engine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sandbox_tools.paths import socket_path
from tests.engine.servers import APPLICATION, ODD
from tests.machine import PATIENCE, Box, EngineProcess

MB = 1 << 20


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    """A sandbox in which user code has opened ports of its own."""
    made = engine.create()
    made.run(APPLICATION)
    made.run(ODD)
    yield made
    made.kill()


def to(box: Box, port: int = 8000) -> dict[str, str]:
    return {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": str(port)}


@contextlib.contextmanager
def raw(box: Box, head: str, *headers: str, port: int = 8000) -> Iterator[socket.socket]:
    """A connection on which a request's head has been sent."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(socket_path(box.engine.state)))
        lines = [head + " HTTP/1.1", f"Host: {port}-{box.id}.localhost", *headers]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        yield connection


def until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        piece = connection.recv(1 << 16)
        assert piece, received
        received += piece
    return received


def rest(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received


# What goes through.


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_request_arrives_as_it_was_sent_and_its_answer_as_it_was_given(box: Box, method: str) -> None:
    with box.engine.http() as http:
        answer = http.request(method, "/a%20b/ä?x=%2F&y", headers=[*to(box).items(), ("X-Two", "1"), ("X-Two", "2")])

    asked = answer.json()
    assert (asked["method"], asked["path"], asked["query"]) == (method, "/a%20b/%C3%A4", "x=%2F&y")
    assert [value for name, value in asked["headers"] if name == "x-two"] == ["1", "2"]
    assert answer.headers["x-own"] == "yes"
    assert answer.headers.get_list("server") == ["mine"]


@pytest.mark.parametrize("status", [201, 302, 404, 418, 503])
def test_an_applications_own_status_is_passed_on(box: Box, status: int) -> None:
    with box.engine.http() as http:
        answer = http.get("/", params={"status": str(status)}, headers=to(box))

    assert answer.status_code == status
    assert answer.json()["method"] == "GET"


def test_what_belongs_to_one_hop_stays_on_it(box: Box) -> None:
    with raw(box, "GET /", "Connection: close, X-Hop", "X-Hop: 1", "Keep-Alive: 5", "TE: trailers", "X-End: 1") as sent:
        answer = rest(sent)

    names = {name for name, _ in json.loads(answer.split(b"\r\n\r\n", 1)[1])["headers"]}
    assert "x-end" in names
    assert not names & {"x-hop", "keep-alive", "te"}


def test_head_has_the_headers_of_get_and_no_body(box: Box) -> None:
    with box.engine.http() as http:
        get, head = (http.request(method, "/", headers=to(box)) for method in ("GET", "HEAD"))

    assert head.status_code == 200
    assert head.content == b""
    # HEAD is a letter longer than GET, and its connection is its own.
    assert int(head.headers["content-length"]) == len(get.content) + 1 + len('["connection","close"],')


def test_much_goes_up_and_down_whole(box: Box) -> None:
    block = os.urandom(MB)
    total = hashlib.sha256()

    def body() -> Iterator[bytes]:
        for _ in range(32):
            total.update(block)
            yield block

    with box.engine.http() as http:
        sized = http.post("/digest", content=block * 32, headers=to(box)).json()
        chunked = http.post("/digest", content=body(), headers=to(box)).json()
        assert sized == chunked == {"bytes": 32 * MB, "sha256": total.hexdigest()}

        received = hashlib.sha256()
        with http.stream("GET", "/blob/32", headers=to(box)) as answer:
            for piece in answer.iter_raw():
                received.update(piece)
        assert received.hexdigest() == hashlib.sha256(bytes(range(256)) * 4096 * 32).hexdigest()


def test_both_directions_stream_at_once(box: Box) -> None:
    """An answer may begin, and go on, while its request is still being sent."""
    with raw(box, "POST /echo", "Transfer-Encoding: chunked") as sent:
        for word in (b"one", b"two", b"three"):
            sent.sendall(b"%x\r\n%b\r\n" % (len(word), word))
            assert word.upper() in until(sent, word.upper())
        sent.sendall(b"0\r\n\r\n")
        assert until(sent, b"0\r\n\r\n").endswith(b"0\r\n\r\n")


def test_a_client_that_asks_for_leave_is_given_it_by_the_server_inside(box: Box) -> None:
    with raw(box, "POST /digest", "Content-Length: 4", "Expect: 100-continue") as sent:
        assert b"100 Continue" in until(sent, b"\r\n\r\n")
        sent.sendall(b"body")
        assert hashlib.sha256(b"body").hexdigest().encode() in until(sent, b"}")


def target(answer: bytes, then: str = "close") -> str:
    return f"/_{base64.urlsafe_b64encode(answer).decode()}/{then}"


def test_a_server_may_refuse_a_body_before_it_is_sent(box: Box) -> None:
    no = b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno"
    with raw(box, f"POST {target(no)}", "Content-Length: 4", "Expect: 100-continue", port=8001) as sent:
        answer = until(sent, b"no")

    assert answer.startswith(b"HTTP/1.1 417")
    assert b"100 Continue" not in answer


def test_a_server_may_answer_before_it_has_read_all(box: Box) -> None:
    enough = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
    with raw(box, f"POST {target(enough)}", "Content-Length: 50000000", port=8001) as sent:
        sent.sendall(bytes(1 << 16))
        assert until(sent, b"\r\n\r\nno").startswith(b"HTTP/1.1 413")


def test_events_come_one_by_one_and_end_inside_when_the_client_leaves(box: Box) -> None:
    with box.engine.http() as http, http.stream("GET", "/events", headers=to(box)) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert [next(lines) for _ in range(5)] == [f"data: {number}" for number in range(5)]

    still = "import time\nwhile True:\n    n = len(ticks); time.sleep(0.3)\n    if len(ticks) == n: break\nn > 4"
    assert box.value(still) == "True"


def odd(box: Box, answer: bytes, then: str = "close", method: str = "GET") -> httpx.Response:
    with box.engine.http() as http:
        return http.request(method, target(answer, then), headers=to(box, 8001))


def test_answers_of_every_framing_are_passed_on(box: Box) -> None:
    assert odd(box, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "wait").text == "hi"
    assert odd(box, b"HTTP/1.1 200 OK\r\n\r\nhi").text == "hi"
    assert odd(box, b"HTTP/1.0 200 OK\r\n\r\nhi").text == "hi"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Trailer: dropped\r\n\r\n"
    assert odd(box, chunked, "wait").text == "hi"
    assert odd(box, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhi").text == "hi"
    assert odd(box, b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n", "wait").status_code == 204
    assert odd(box, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", "wait").status_code == 304
    head = odd(box, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "wait", "HEAD")
    assert (head.content, head.headers["content-length"]) == (b"", "2")
    twice = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"
    assert (odd(box, twice).status_code, odd(box, twice).text) == (200, "hi")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
    ],
)
def test_half_an_answer_is_never_taken_for_a_whole_one(box: Box, answer: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        odd(box, answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-server\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x01b\r\n\r\n",
        b"HTTP/1.1 999 Strange\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
def test_a_server_that_gives_no_http_answer_is_said_to_run_all_the_same(box: Box, answer: bytes) -> None:
    """Clients take the words `was not found` for the end of their sandbox."""
    got = odd(box, answer)

    assert got.status_code == 502
    assert "gave no answer" in got.json()["message"]
    assert "was not found" not in got.json()["message"]


def test_a_head_without_end_is_cut_off(box: Box) -> None:
    got = odd(box, b"HTTP/1.1 200 OK\r\n", "forever")

    assert got.status_code == 502
    assert "head of more than" in got.json()["message"]


def test_a_port_where_nobody_listens_is_said_to_be_closed(box: Box) -> None:
    with box.engine.http() as http:
        got = http.get("/", headers=to(box, 8999))

    assert got.status_code == 502
    assert got.json() == {
        "sandboxId": box.id,
        "message": "The sandbox is running but port is not open",
        "port": 8999,
        "code": 502,
    }


def test_a_large_upload_to_a_closed_port_is_answered_too(box: Box) -> None:
    with box.engine.http() as http:
        assert http.post("/", content=bytes(20 * MB), headers=to(box, 8999)).status_code == 502


# Who may come in.


def test_user_ports_are_public_unless_a_traffic_token_was_asked_for(engine: EngineProcess, box: Box) -> None:
    with engine.http() as http:
        assert http.get("/", headers={"Host": f"8000-{box.id}.localhost"}).status_code == 200
        assert http.get("/", headers={"Host": f"8000-{box.id}-6532622b.e2b.app"}).status_code == 200
        assert http.get("/templates", headers={"Host": f"8000-{box.id}.localhost"}).json()["path"] == "/templates"


def test_envd_and_the_interpreter_ask_for_the_sandboxs_token_and_hear_it(box: Box) -> None:
    code = {"code": "1", "context_id": None, "language": None, "env_vars": None}
    with box.engine.http() as http:
        for token in ({}, {"X-Access-Token": "wrong"}, {"X-Access-Token": box.token[:-1]}):
            assert http.get("/envs", headers=to(box, 49983) | token).status_code == 401
            assert http.post("/execute", json=code, headers=to(box, 49999) | token).status_code == 401
        assert http.post("/execute%0A", json=code, headers=to(box, 49999)).status_code == 401
        assert http.get("/envs", headers=to(box, 49983) | {"X-Access-Token": box.token}).status_code == 200
        assert http.get("/health", headers=to(box, 49983)).status_code == 204
        assert http.get("/contexts", headers=to(box, 49999)).status_code == 200


def test_a_token_alone_finds_its_sandbox_and_the_path_its_service(box: Box) -> None:
    """All that PPIO's SDK sends after a connect."""
    token = {"X-Access-Token": box.token}
    with box.engine.http() as http:
        assert http.get("/health", headers=token).status_code == 204
        assert http.get("/contexts", headers=token).status_code == 200
        gone = http.get("/health", headers={"X-Access-Token": "of a sandbox that is no more"})
        assert (gone.status_code, gone.json()["message"]) == (502, "The sandbox was not found")


def test_a_user_name_that_is_an_address_does_not_reach_the_server_inside(box: Box) -> None:
    def basic(user: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()}

    def heard(headers: dict[str, str]) -> dict[str, str]:
        with box.engine.http() as http:
            return dict(http.get("/", headers=headers).json()["headers"])

    assert "authorization" not in heard(basic(f"8000-{box.id}.sbx"))
    assert "authorization" in heard(to(box) | basic("root"))


def test_how_the_engine_speaks_with_its_guest_is_not_to_be_reached(box: Box) -> None:
    headers = to(box, 49983) | {"X-Access-Token": box.token}
    with box.engine.http() as http:
        for path in ("/init", "/init/", "/%69nit", "/init%0A", "/reboot", "/warm"):
            assert http.post(path, json={"accessToken": "mine"}, headers=headers).status_code == 404
        assert http.get("/envs", headers=headers).status_code == 200


def test_the_traffic_token_of_a_sandbox_is_not_told_to_its_servers(box: Box) -> None:
    with box.engine.http() as http:
        asked = http.get("/", headers=to(box) | {"E2B-Traffic-Access-Token": "secret"})

    assert "secret" not in asked.text


# Beginnings and ends.


def test_a_pause_answers_first_then_breaks_what_streams_and_a_resume_brings_the_service_back(
    engine: EngineProcess,
) -> None:
    """In that order: E2B's SDK asks `/health` as soon as its stream breaks, and must not be told that all is well."""
    box = engine.create()
    box.run(APPLICATION)
    with engine.http() as http, engine.http() as other:
        with http.stream("GET", "/events", headers=to(box)) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert box.post("pause").status_code == 204
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in lines:
                    pass
        for port in (8000, 49983, 49999):
            gone = other.get("/health", headers=to(box, port))
            assert gone.status_code == 502
            assert gone.json() == {"sandboxId": box.id, "message": "The sandbox was not found", "code": 502}

        assert box.post("connect", timeout=600).status_code == 201
        assert other.get("/", headers=to(box)).json()["method"] == "GET"
        assert box.value("len(visits)") == "1"

        with http.stream("GET", "/events", headers=to(box)) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert box.kill() == 204
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in lines:
                    pass
        gone = other.get("/health", headers=to(box, 49983))
        assert (gone.status_code, gone.json()["message"]) == (502, "The sandbox was not found")


def test_traffic_wakes_a_sandbox_that_asked_for_it_and_only_who_may_come_in_does(engine: EngineProcess) -> None:
    box = engine.create(autoPause=True, autoResume={"enabled": True})
    box.run("kept = 'yes'")
    assert box.post("pause").status_code == 204
    with engine.http() as http:
        assert http.get("/envs", headers=to(box, 49983) | {"X-Access-Token": "wrong"}).status_code == 401
    assert box.info()["state"] == "paused"

    assert box.value("kept") == "yes"
    assert box.info()["state"] == "running"
    box.kill()


def test_clients_that_leave_in_the_middle_leave_nothing_behind(box: Box) -> None:
    """Counted: the engine's file descriptors, and the connections of the servers inside."""
    held = Path(f"/proc/{box.engine.pid}/fd")
    box.value("1")
    before = len(list(held.iterdir()))
    for number in range(40):
        path = ("/events", "/blob/200", "/echo", "/digest")[number % 4]
        with raw(box, f"POST {path}" if number % 4 > 1 else f"GET {path}", "Transfer-Encoding: chunked") as sent:
            sent.sendall(b"5\r\nhello\r\n" + b"0\r\n\r\n" * (number % 4 < 2))
            if number % 4 < 3:
                until(sent, b"\r\n\r\n")

    inside = (
        "import time\nfor _ in range(500):\n    if not server.server_state.connections: break\n    time.sleep(0.02)\n"
    )
    assert box.value(inside + "len(server.server_state.connections)") == "0"
    assert len(list(held.iterdir())) <= before
