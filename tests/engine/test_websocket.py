"""WebSockets to the ports of a sandbox, with a client and a server that know nothing of the gateway between them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, unix_connect

from sandbox_tools.paths import socket_path
from tests.engine.servers import APPLICATION
from tests.machine import PATIENCE, Box, EngineProcess

MB = 1 << 20


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    """A sandbox in which a WebSocket server listens."""
    made = engine.create()
    made.run(APPLICATION)
    yield made
    made.kill()


def connect(box: Box, path: str = "/talk", port: int = 8002, **options: Any) -> ClientConnection:
    uri = f"ws://{port}-{box.id}.localhost{path}"
    waits = {"open_timeout": PATIENCE, "ping_timeout": PATIENCE, "close_timeout": PATIENCE}
    return unix_connect(str(socket_path(box.engine.state)), uri, max_size=None, **(waits | options))


def test_texts_bytes_and_big_messages_come_back_whole(box: Box) -> None:
    big = os.urandom(20 * MB)
    with connect(box) as talk:
        for message in ("text ä", b"", b"\x00\xff", big, "x" * MB):
            talk.send(message)
            assert talk.recv(PATIENCE) == message


def test_pings_are_answered_from_inside(box: Box) -> None:
    with connect(box) as talk:
        assert talk.ping(b"there?").wait(PATIENCE)


def test_headers_and_subprotocols_are_between_client_and_server(box: Box) -> None:
    with connect(box, subprotocols=["first", "second"], additional_headers={"X-Own": "yes"}) as talk:
        assert talk.subprotocol == "second"
        talk.send("headers")
        heard = json.loads(talk.recv(PATIENCE))
    assert heard["X-Own"] == "yes"
    assert heard["Host"] == f"8002-{box.id}.localhost"


def test_a_close_carries_its_code_and_reason_both_ways(box: Box) -> None:
    with connect(box) as talk:
        talk.send("close")
        with pytest.raises(ConnectionClosedError) as closed:
            talk.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "enough")

    box.run("closed.clear()")
    with connect(box) as talk:
        talk.close(4000, "bye")
    assert box.value("import time\nwhile not closed: time.sleep(0.01)\nclosed") == "[(4000, 'bye')]"


def test_a_reader_that_stands_still_stops_the_server_inside(box: Box) -> None:
    """A gigabyte is not piled up in the engine, nor anywhere else."""
    box.run("sent.clear()")
    with connect(box, max_queue=1, close_timeout=0.1) as talk:
        talk.send("flood")
        assert len(talk.recv(PATIENCE)) == MB
        settled = "import time\nn = -1\nwhile n != len(sent):\n    n = len(sent); time.sleep(0.3)\nn < 200"
        assert box.value(settled) == "True"
        assert [len(talk.recv(PATIENCE)) for _ in range(50)] == [MB] * 50


def test_a_server_that_wants_no_websocket_says_so_itself(box: Box) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(box, "/refuse")

    assert refused.value.response.status_code == 418
    assert refused.value.response.body == b"no talk here"


@pytest.mark.parametrize(
    ("port", "path", "status", "words"),
    [
        (8999, "/", 502, b"port is not open"),
        (49983, "/process.Process/Start", 401, b"unauthorized"),
        (49983, "/init", 404, b"not found"),
        (99999, "/", 400, b"Invalid sandbox port"),
    ],
)
def test_where_no_websocket_is_to_be_had_the_answer_says_why(
    box: Box, port: int, path: str, status: int, words: bytes
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(box, path, port)

    assert refused.value.response.status_code == status
    assert refused.value.response.body is not None
    assert words in refused.value.response.body


def test_a_pause_breaks_it_without_a_goodbye_and_a_resume_lets_clients_come_back(engine: EngineProcess) -> None:
    """A closing frame would tell the client that the server wanted to end it."""
    box = engine.create()
    box.run(APPLICATION)
    with connect(box) as talk:
        talk.send("hello")
        assert talk.recv(PATIENCE) == "hello"
        assert box.post("pause").status_code == 204
        with pytest.raises(ConnectionClosedError) as broken:
            talk.recv(PATIENCE)
        assert broken.value.rcvd is None

    with pytest.raises(InvalidStatus) as refused:
        connect(box)
    assert refused.value.response.status_code == 502
    assert b"was not found" in (refused.value.response.body or b"")

    assert box.post("connect", timeout=600).status_code == 201
    with connect(box) as talk:
        talk.send("hello again")
        assert talk.recv(PATIENCE) == "hello again"
    assert box.value("import time\nwhile len(closed) < 2: time.sleep(0.01)\nlen(closed)") == "2"
    box.kill()
