"""A real HTTP/1.1 server on loopback that keeps each request as it came, and answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One request; the bytes of its target and body are those that came."""

    method: str
    target: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    server_name: str | None
    """The host that TLS was asked for. None: there was no TLS."""
    connection: int
    """Which connection it came on, counted from 1."""

    @property
    def path(self) -> str:
        """As it came, with its percent-encoding."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """Its parameters, with all their encodings."""
        pairs = [pair.partition("=") for pair in self.target.partition("?")[2].split("&") if pair]
        assert len({name for name, _, _ in pairs}) == len(pairs), f"A parameter came twice: {self.target}"
        return {name: value for name, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What to say to one request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    ending: str = "whole"
    """`whole`; `cut`: the connection breaks after `body`, which was to go on; `never`: it stays open after `body`, and
    nothing comes; `deaf`: it is closed before any answer; `silent`: no answer ever comes."""


def said(status: int, value: Any, **headers: str) -> Answer:
    """An answer in JSON; `_` in a header's name stands for `-`."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status=status, body=json.dumps(value).encode(), headers={"content-type": "application/json", **named})


def refused(status: int, message: str = "because", *, error_code: str | None = None, **headers: str) -> Answer:
    """An error of the control plane, as all of them are worded."""
    code = {"error_code": error_code} if error_code else {}
    return said(status, {"code": status, "message": message, **code}, **headers)


class Recorder:
    """What was asked, and what is answered: each route's answers in their order, the last one for good."""

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.unexpected: list[Recorded] = []
        self.routes: list[tuple[str, re.Pattern[str], list[Answer]]] = []
        self.open = 0
        """Connections that are open now."""
        self.port = 0
        self.tls_port = 0
        self._connections = 0

    def on(self, method: str, path: str, *answers: Answer) -> None:
        """Answers this from now on; wins over what was said before. `path` is a regular expression for all of it."""
        self.routes.insert(0, (method, re.compile(path), list(answers)))

    def asked(self, path: str) -> list[Recorded]:
        """The requests for a path, a regular expression."""
        return [request for request in self.requests if re.fullmatch(path, request.path)]

    def answer(self, request: Recorded) -> Answer:
        """From the script; what is not in it is kept, and fails the test."""
        for method, path, answers in self.routes:
            if method == request.method and path.fullmatch(request.path):
                return answers.pop(0) if len(answers) > 1 else answers[0]

        self.unexpected.append(request)
        return refused(418, "This is not in the script.")

    @contextlib.asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None, socket: Path | None = None) -> AsyncIterator[Recorder]:
        """Listens on loopback, with and without TLS, and on a Unix socket if one is named."""
        async with contextlib.AsyncExitStack() as stack:
            plain = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = plain.sockets[0].getsockname()[1]
            servers = [plain]
            if tls:
                servers.append(await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls))
                self.tls_port = servers[-1].sockets[0].getsockname()[1]

            if socket:
                servers.append(await asyncio.start_unix_server(self._serve, socket))

            tasks = self._tasks = set[asyncio.Task[None]]()
            stack.push_async_callback(_end, tasks)
            for server in servers:
                stack.callback(server.close)

            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._connections += 1
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError, ssl.SSLError):
                await self._talk(reader, writer, self._connections)
        finally:
            self.open -= 1
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> None:
        http = h11.Connection(h11.SERVER)
        name = getattr(writer.get_extra_info("ssl_object"), "server_name_asked", None)
        while (request := await _next(http, reader, name, connection)) is not None:
            self.requests.append(request)
            answer = self.answer(request)
            if answer.ending == "deaf":
                writer.transport.abort()
                return

            if answer.ending != "silent":
                whole = answer.ending == "whole"
                # What is to go on has no length; an answer without a body has nothing that could say one.
                length = {"content-length": str(len(answer.body))} if whole and answer.status not in (204, 304) else {}
                headers = [*answer.headers.items(), *length.items()]
                writer.write(http.send(h11.Response(status_code=answer.status, headers=headers)) or b"")
                if answer.body:
                    writer.write(http.send(h11.Data(data=answer.body)) or b"")

                await writer.drain()
                if answer.ending == "cut":
                    # Gone without the last chunk, but not before what was said has left.
                    return

                if whole:
                    writer.write(http.send(h11.EndOfMessage()) or b"")
                    await writer.drain()

            if answer.ending in ("silent", "never"):
                await reader.read()
                return

            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return

            http.start_next_cycle()


async def _next(
    http: h11.Connection, reader: asyncio.StreamReader, name: str | None, connection: int
) -> Recorded | None:
    head: h11.Request | None = None
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            return Recorded(
                method=head.method.decode(),
                target=head.target.decode(),
                headers={name.decode(): value.decode("latin-1") for name, value in head.headers},
                body=body,
                server_name=name,
                connection=connection,
            )
        else:
            return None


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()

    await asyncio.gather(*tasks, return_exceptions=True)
