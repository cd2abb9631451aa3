"""The service that every contestant calls: canned answers of the protocol, as fast as one loop can write them."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from typing import Any

ROWS = 100
SANDBOX_ID = "ib3kz5w8q1m7x2c9v4n6t"
GRANT = {
    "sandboxID": SANDBOX_ID,
    "templateID": "code-interpreter-v1",
    "clientID": "6532622b",
    "envdVersion": "0.4.2",
    "envdAccessToken": "4f1c9a7e" * 8,
    "trafficAccessToken": None,
    "domain": None,
    "alias": "code-interpreter-v1",
}
ROW = {
    "templateID": "code-interpreter-v1",
    "clientID": "6532622b",
    "alias": "code-interpreter-v1",
    "startedAt": "2026-11-23T07:00:00.123456Z",
    "endAt": "2026-11-23T07:05:00.123456Z",
    "cpuCount": 2,
    "memoryMB": 1024,
    "diskSizeMB": 5120,
    "state": "running",
    "envdVersion": "0.4.2",
    "metadata": {"thread": "3b1e6a54-0f7d-4a83-b2a4-0c8f5d9e7a61", "owner": "somebody@example.com"},
}
EVENTS = (
    {"type": "number_of_executions", "execution_count": 1},
    {"type": "stdout", "text": "hello\n", "timestamp": 1763881200123456},
    {"type": "result", "text": "42", "is_main_result": True},
    {"type": "end_of_execution"},
)

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
HOLD = re.compile(rb'"hold (\d+)"')


def answer(status: str, body: Any = None) -> bytes:
    """A whole answer."""
    if body is None:
        return f"HTTP/1.1 {status}\r\n\r\n".encode()
    content = json.dumps(body, separators=(",", ":")).encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )


def chunk(event: dict[str, Any]) -> bytes:
    """One event of a stream."""
    line = json.dumps(event).encode() + b"\n"
    return b"%x\r\n%s\r\n" % (len(line), line)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST, REST = STREAM + chunk(EVENTS[0]), b"".join(map(chunk, EVENTS[1:])) + b"0\r\n\r\n"
CREATED, CONNECTED, DONE = answer("201 Created", GRANT), answer("200 OK", GRANT), answer("204 No Content")
ONE = answer("200 OK", {"sandboxID": SANDBOX_ID, **ROW})
ALL = answer("200 OK", [{"sandboxID": f"{number:04}{SANDBOX_ID[4:]}", **ROW} for number in range(ROWS)])
UNKNOWN = answer("404 Not Found", {"code": 404, "message": "no such path"})


class Connection(asyncio.Protocol):
    """One connection, kept until its client closes it.

    Args:
        held: Streams that have begun and wait until there are as many as their code asks for.
    """

    def __init__(self, held: set[asyncio.Transport]) -> None:
        self.held = held
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where answers go."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """A stream that its client gave up is not open."""
        self.held.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self.received += data
        while (blank := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:blank]
            end = blank + 4
            if CHUNKED.search(head):
                last = self.received.find(b"0\r\n\r\n", end)
                if last < 0:
                    return
                end = last + 5
            elif length := CONTENT_LENGTH.search(head):
                end += int(length[1])
                if len(self.received) < end:
                    return
            body, self.received = self.received[blank + 4 : end], self.received[end:]
            method, path, _ = head.split(b" ", 2)
            self.answer(method, path.partition(b"?")[0], body)

    def answer(self, method: bytes, path: bytes, body: bytes) -> None:
        """Write what belongs to a path."""
        verb = path.rpartition(b"/")[2]
        if path == b"/execute":
            if hold := HOLD.search(body):
                self.hold(int(hold[1]))
            else:
                self.transport.write(FIRST + REST)
        elif verb == b"sandboxes":
            self.transport.write(CREATED if method == b"POST" else ALL)
        elif verb == b"connect":
            self.transport.write(CONNECTED)
        elif method == b"GET" and b"/sandboxes/" in path:
            self.transport.write(ONE)
        elif method == b"DELETE" or verb in (b"pause", b"timeout", b"health"):
            self.transport.write(DONE)
        else:
            self.transport.write(UNKNOWN)

    def hold(self, count: int) -> None:
        """Begin a stream; the one that makes the number full ends them all."""
        self.transport.write(FIRST)
        self.held.add(self.transport)
        if len(self.held) == count:
            for transport in self.held:
                transport.write(REST)
            self.held.clear()


async def main() -> None:
    """Serve until killed; the port is the first line of the output."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    held: set[asyncio.Transport] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(held), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
