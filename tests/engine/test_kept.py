"""A connection to a port inside serves several requests, where nothing but its speed tells."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from sandbox_tools.engine.http1 import Answer
from sandbox_tools.engine.kept import KEPT
from tests.machine import Box, EngineProcess

# Keeps account of its connections; the path says how it behaves.
SERVER = """
import collections, http.server, json, threading

asked = []
hosts = collections.Counter()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    count = 0

    def do_GET(self):
        self.count += 1
        asked.append([self.command, self.path, self.client_address[1]])
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/silent" and self.count > 1:
            self.close_connection = True
            return
        self.close_connection = self.path == "/once" or self.close_connection
        body = json.dumps({"connection": self.client_address[1], "count": self.count}).encode()
        self.send_response(204 if self.path == "/empty" else 200)
        if self.path != "/empty":
            self.send_header("content-length", len(body))
        self.end_headers()
        more = {"/empty": b"", "/more": body + b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nforged"}
        self.wfile.write(more.get(self.path, body))

    do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass

many = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
single = http.server.HTTPServer(("127.0.0.1", 8001), Handler)
for each in (many, single):
    threading.Thread(target=each.serve_forever, daemon=True).start()
"""

FROM_INSIDE = """
import time, urllib.request
began = time.monotonic()
urllib.request.urlopen("http://127.0.0.1:8001/").read()
time.monotonic() - began
"""


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    """A sandbox in which the server runs."""
    made = engine.create()
    made.run(SERVER)
    yield made
    made.kill()


def ask(box: Box, path: str = "/", method: str = "GET", *, port: int = 8000, content: bytes = b"") -> httpx.Response:
    """As a client that has never been there before."""
    with box.engine.http() as http:
        address = {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": str(port)}
        return http.request(method, path, headers=address, content=content)


def connection(box: Box, path: str = "/", method: str = "GET") -> int:
    """Which one the server answered on."""
    number: int = ask(box, path, method).json()["connection"]
    return number


def test_the_next_client_that_only_reads_is_answered_on_the_connection_of_the_one_before(box: Box) -> None:
    assert len({connection(box) for _ in range(10)}) < 10


def test_what_must_not_be_repeated_is_asked_on_a_connection_of_its_own(box: Box) -> None:
    first, posted, after = connection(box), connection(box, method="POST"), connection(box)

    assert len({first, posted, after}) == 3
    assert ask(box, content=b"a body").json()["count"] == 1
    assert ask(box, method="HEAD").status_code == 200
    assert ask(box).json()["count"] == 1


@pytest.mark.parametrize("path", ["/once", "/more", "/empty"])
def test_a_server_that_closes_or_says_too_much_is_asked_again_on_a_new_connection(box: Box, path: str) -> None:
    for _ in range(10):
        answer = ask(box, path)
        assert answer.status_code in (200, 204)
        assert b"forged" not in answer.content
        assert ask(box).json()["connection"] == json.loads(box.value("asked[-1][2]"))


def test_a_reader_whose_connection_is_closed_under_its_request_is_answered_on_another(box: Box) -> None:
    first = ask(box, "/silent").json()
    box.run("asked.clear()")
    second = ask(box, "/silent").json()

    assert (first["count"], second["count"]) == (1, 1)
    assert second["connection"] != first["connection"]
    assert box.value("[one[2] for one in asked]") == f"[{first['connection']}, {second['connection']}]"


def test_a_server_that_serves_one_connection_at_a_time_is_never_in_the_way_of_a_caller_from_outside(box: Box) -> None:
    def seconds() -> float:
        began = time.monotonic()
        for method in ("GET", "GET", "POST", "GET", "POST", "POST"):
            assert ask(box, "/", method, port=8001).status_code == 200
        return time.monotonic() - began

    assert min(seconds() for _ in range(5)) < KEPT
    assert float(box.value(FROM_INSIDE)) < 10 * KEPT


def test_a_kept_connection_does_not_outlast_a_pause(engine: EngineProcess, box: Box) -> None:
    first = connection(box)
    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201

    assert connection(box) != first


@pytest.mark.parametrize(
    ("answer", "persistent"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", False),
        (b"HTTP/1.1 200 OK\r\n\r\nhi", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi, and more", False),
    ],
)
def test_only_a_server_that_lets_another_request_follow_is_asked_again(answer: bytes, persistent: bool) -> None:
    for size in (1, 7, len(answer)):
        heard = Answer("GET")
        body = b"".join(heard.feed(answer[at : at + size]) for at in range(0, len(answer), size))
        if not heard.complete:
            heard.end()
        assert (body, heard.persistent) == (b"hi", persistent)
