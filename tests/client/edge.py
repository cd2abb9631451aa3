"""A provider with one sandbox in the test's own loop: it answers, fails, resets or waits, request by request."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs

from tests.client.server import Server, line

_PART = re.compile(rb'filename="([^"]+)"\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--', re.DOTALL)

RESET = 0
"""In place of a status: the connection is reset instead of an answer."""


class Edge:
    """Notes every request, and has files as a dict of paths."""

    def __init__(self) -> None:
        self.state = "running"
        self.seen: list[str] = []
        self.connections: list[list[str]] = []
        """The requests of each connection, in the order in which they were opened."""
        self.failures: list[int] = []
        """Statuses of the next requests to the sandbox itself, in place of answers."""
        self.lost: set[str] = set()
        """Requests that are carried out, once, and whose connection is then reset."""
        self.refused: dict[str, int] = {}
        """Requests to the control plane that are refused, and with which status."""
        self.held: str | None = None
        """The request that waits for ever."""
        self.holding = asyncio.Event()
        self.bodies: dict[str, list[bytes]] = {}
        self.files: dict[str, bytes] = {}
        self.on_connect: Callable[[], None] = lambda: None
        self.contexts = b'[{"id": "c1", "language": "python", "cwd": "/home/user", "more": 1}]'

    @asynccontextmanager
    async def serve(self, socket: Path) -> AsyncIterator[None]:
        """Serves on a Unix socket."""
        async with await asyncio.start_unix_server(self._connection, socket):
            yield

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[str] = []
        self.connections.append(mine)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                body = await reader.readexactly(int(length[1]) if length else 0)
                method, target, _ = head.decode().split(" ", 2)
                request = f"{method} {target}"
                if request != "GET /health" or b"e2b-sandbox-id" in head.lower():
                    self.seen.append(request)
                mine.append(request)
                self.bodies.setdefault(request, []).append(body)
                if request == self.held:
                    self.holding.set()
                    await reader.read()  # until the client leaves
                    return

                status, content = self._answer(request, b"e2b-sandbox-id" in head.lower(), body)
                if status == RESET:
                    writer.transport.abort()
                    return

                size = b"" if status == 204 else b"content-length: %d\r\n" % len(content)
                writer.write(b"HTTP/1.1 %d X\r\n%s\r\n%s" % (status, size, content))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, request: str, inside: bool, body: bytes) -> tuple[int, bytes]:
        if inside and self.failures:
            return self.failures.pop(0), b'{"code": 502, "message": "The sandbox was not found"}'

        answer = self._inside(request, body) if inside else self._control(request)
        if request in self.lost:
            self.lost.remove(request)
            return RESET, b""

        return answer

    def _control(self, request: str) -> tuple[int, bytes]:
        if request in self.refused:
            return self.refused[request], b'{"code": 500, "message": "no"}'

        if request == "GET /health":
            return 200, b""

        if request.endswith("/pause"):
            paused, self.state = self.state == "paused", "paused"
            return (409, b'{"code": 409, "message": "is already paused"}') if paused else (204, b"")

        if request.endswith("/connect"):
            woken, self.state = self.state == "paused", "running"
            if woken:
                self.on_connect()
            return 201 if woken else 200, json.dumps(Server().grant("i1")).encode()

        row = {**Server().row_of("i1"), "state": self.state}
        return (201 if request.startswith("POST") else 200), json.dumps(row).encode()

    def _inside(self, request: str, body: bytes) -> tuple[int, bytes]:
        if self.state == "paused":
            return 502, b'{"code": 502, "message": "The sandbox was not found"}'

        method, _, target = request.partition(" ")
        path, _, query = target.partition("?")
        match method, path:
            case "GET", "/health":
                return 204, b""
            case "POST", "/execute":
                return 200, line(type="end_of_execution")
            case "GET", "/contexts":
                return 200, self.contexts
            case "POST", "/contexts":
                return 200, json.dumps({"id": "c2", "language": "python", "cwd": "/tmp", **json.loads(body)}).encode()
            case (("POST" | "DELETE"), "/contexts/c1" | "/contexts/c1/restart"):
                return 200, b"null"
            case (("POST" | "DELETE"), _) if path.startswith("/contexts/"):
                return 404, b"Context " + path.split("/")[2].encode() + b" not found"
            case "POST", "/files":
                self.files |= {name.decode(): content for name, content in _PART.findall(body)}
                return 200, b'[{"path": "/x", "name": "x", "type": "file"}]'
            case "GET", "/files":
                name = parse_qs(query)["path"][0]
                missing = json.dumps({"code": 404, "message": f"path '{name}' does not exist"}).encode()
                return (200, self.files[name]) if name in self.files else (404, missing)
            case _:
                return 404, b"Not Found"
