"""A sandbox of bytes: a real server on a Unix socket that answers what it was told to, for failures on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.client.codec import ENVELOPE, LAST
from sandbox_tools.errors import NotFoundError
from tests.client.server import Server

ABORT = "abort"
"""Breaks the connection."""

HANG = "hang"
"""Says nothing more until the client leaves."""

Step = bytes | str | float


@dataclass
class Request:
    """What came in; its body is nothing where the client left before it was whole."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Loopback:
    """Answers each request below `/` with the next of the steps for its path, the last ones for good."""

    answers: dict[str, list[list[Step]]] = field(default_factory=dict)
    state: str | None = "running"
    """What the control plane says of the sandbox. None: it is gone."""
    requests: list[Request] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client has left a request that hangs."""
    hanging: asyncio.Event = field(default_factory=asyncio.Event)

    def on(self, path: str, *answers: list[Step]) -> None:
        self.answers[path] = list(answers)

    def sent(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.target.partition("?")[0] == path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                request = await self._request(reader)
                path = request.target.partition("?")[0]
                if path in self.answers:
                    steps = self.answers[path]
                    await self._answer(steps.pop(0) if len(steps) > 1 else steps[0], reader, writer)
                elif path == "/sandboxes/i1":
                    row = {**Server().row_of("i1"), "state": self.state}
                    gone = {"code": 404, "message": "no such sandbox"}
                    writer.write(plain(row) if self.state else plain(gone, 404))
                else:
                    writer.write(plain(Server().grant("i1")))
        writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Request:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        method, target, _ = first.split()
        pairs = [line.partition(": ") for line in lines]
        request = Request(method, target, {name.lower(): value for name, _, value in pairs})
        self.requests.append(request)
        if "content-length" in request.headers:
            request.body = await reader.readexactly(int(request.headers["content-length"]))
        elif request.headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                request.body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        return request

    async def _answer(self, steps: list[Step], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for step in steps:
            match step:
                case bytes():
                    writer.write(step)
                    await writer.drain()
                case "abort":
                    writer.transport.abort()
                    raise ConnectionAbortedError
                case "hang":
                    self.hanging.set()
                    try:
                        assert not await reader.read()
                    finally:  # a client that had not read everything resets the connection
                        self.left.set()
                    raise ConnectionAbortedError


def plain(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n{more}\r\n".encode() + data


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/connect+json\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"0\r\n\r\n"


def chunk(*messages: bytes) -> bytes:
    """A piece of an answer that comes in pieces."""
    data = b"".join(messages)
    return b"%x\r\n%s\r\n" % (len(data), data)


def envelope(message: Mapping[str, Any], flags: int = 0) -> bytes:
    data = json.dumps(message).encode()
    return ENVELOPE.pack(flags, len(data)) + data


def end(code: str | None = None, message: str = "because") -> bytes:
    """What ends a stream: well, or with one of Connect's codes."""
    return envelope({} if code is None else {"error": {"code": code, "message": message}}, LAST)


@contextlib.asynccontextmanager
async def reaching(state: Path) -> AsyncIterator[tuple[Loopback, Sandbox]]:
    """A loopback server, and the sandbox that a client has on it."""
    loopback = Loopback()
    async with await asyncio.start_unix_server(loopback.serve, state / "engine.sock"):
        async with Client(provider="local", state_dir=state) as client:
            yield loopback, Sandbox(client, (await client.grant("i1", timeout=60))[0])


def descriptors() -> int:
    """Open files and sockets of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.asynccontextmanager
async def nothing_left(sandbox: Sandbox) -> AsyncIterator[None]:
    """What is begun in here must not leave a task or a descriptor behind, beyond the client's one kept connection.

    Both get a moment to end. The client ends others that it has kept for too long when it is asked something.
    """
    await ask(sandbox)
    tasks, fds = len(asyncio.all_tasks()), descriptors()
    yield
    async with asyncio.timeout(10):
        # Counted only: the task that serves the kept connection may be another one.
        while len(asyncio.all_tasks()) > tasks or descriptors() > fds:
            await asyncio.sleep(0.01)
            await ask(sandbox)


async def ask(sandbox: Sandbox) -> None:
    with contextlib.suppress(NotFoundError):
        await sandbox.info()
