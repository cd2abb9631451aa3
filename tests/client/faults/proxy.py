"""A proxy between a client and a server of the protocol that does to requests what bad networks do to them."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import random
import re
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import h11

from tests.client.faults.schedule import NONE, Fault, Schedule

PAGE = "3"
"""Rows on a page of `list`, whatever was asked for: so there are pages."""

GARBAGE = b"<html><body>Please log in to this network.</body></html>"

STREAMS = {"run_code", "command"}
"""What ends when its client leaves."""

HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length"}

_VERBS = {
    ("POST", r"(?:/v2)?/sandboxes"): "create",
    ("GET", r"/v2/sandboxes"): "list",
    ("GET", r"/sandboxes/([^/]+)"): "info",
    ("DELETE", r"/sandboxes/([^/]+)"): "kill",
    ("POST", r"/sandboxes/([^/]+)/pause"): "pause",
    ("POST", r"(?:/v2)?/sandboxes/([^/]+)/connect"): "connect",
    ("POST", r"/sandboxes/([^/]+)/timeout"): "set_timeout",
    ("POST", r"/execute"): "run_code",
    ("POST", r"/process.Process/Start"): "command",
    ("POST", r"/sandboxes/([^/]+)/snapshots"): "snapshot",
    ("DELETE", r"/templates/([^/]+)"): "delete_snapshot",
    ("POST", r"/sandboxes/([^/]+)/fork"): "fork",
    ("GET", r"/files"): "read",
    ("POST", r"/files"): "write",
    ("POST", r"/filesystem.Filesystem/\w+"): "filesystem",
    ("POST", r"/contexts"): "create_context",
    ("DELETE", r"/contexts/[^/]+"): "remove_context",
}


@dataclass(kw_only=True)
class Exchange:
    """One request and what became of it."""

    verb: str
    sandbox_id: str | None
    body: bytes = b""
    fault: Fault = NONE
    forwarded: bool = False
    """Whether the server was sent any of it."""
    status: int | None = None
    """What the server answered. None: nothing that the proxy saw."""
    answer: Any = None
    """The server's answer to a create."""

    @property
    def told(self) -> str:
        """In short."""
        return f"{self.verb}: {self.fault.kind} ({self.fault.status}), forwarded {self.forwarded}, status {self.status}"

    def is_about(self, what: str) -> bool:
        """Whether it names a sandbox by that id, or has that in its body."""
        return self.sandbox_id == what or what.encode() in self.body


@dataclass(kw_only=True)
class _Answer:
    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


class _Cut(Exception):
    """Raised to end the client's connection."""


class Proxy:
    """Listens on a TCP port of its own and passes requests on to another, each on a connection of its own.

    What reached the proxy is passed on even if the client has left, except code: its end is how code is interrupted.
    """

    def __init__(self, host: str, port: int, schedule: Schedule) -> None:
        self._upstream = (host, port)
        self._schedule = schedule
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Bound and never listening: while the door is closed, connections are refused and the port is nobody else's.
        self._holder.bind(("127.0.0.1", 0))
        self.port: int = self._holder.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._work: dict[asyncio.Task[None], Exchange] = {}
        self._shuffled: list[list[Any]] = []
        self.connections: set[_Connection] = set()
        self.ledger: list[Exchange] = []
        self.secrets: set[str] = set()
        self.failures: list[Exception] = []
        """What went wrong in the proxy itself."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Proxy:
        await self._open_door()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        while tasks := self.tasks:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await self._close_door()
        self._holder.close()

    async def settled(self, what: str) -> None:
        """Wait until the server has answered all that was passed on about a sandbox, or with that in its body."""
        while under_way := [task for task, exchange in self._work.items() if exchange.is_about(what)]:
            await asyncio.wait(under_way)

    async def deserted(self) -> None:
        """Wait until no client has a connection here."""
        while self.connections:
            await asyncio.wait([connection.pumping for connection in self.connections])
            await asyncio.sleep(0)

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """All tasks that are the proxy's own."""
        pumping = (connection.pumping for connection in self.connections if not connection.pumping.done())
        return {*self._tasks, *self._work, *pumping}

    async def _open_door(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", self.port))
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def _close_door(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _shut_for(self, seconds: float) -> None:
        if self._server is not None:
            await self._close_door()
            await asyncio.sleep(seconds)
            await self._open_door()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = _Connection(reader, writer)
        self.connections.add(connection)
        try:
            while (request := await connection.request()) is not None:
                await self._exchange(connection, *request)
                connection.next()
        except (_Cut, OSError, h11.ProtocolError):
            pass
        finally:
            connection.end()
            # The connection is the client's until the client's end is closed too.
            with contextlib.suppress(asyncio.CancelledError):
                await connection.pumping
            connection.writer.close()
            self.connections.discard(connection)
            self._tasks.discard(task)

    async def _exchange(self, connection: _Connection, request: h11.Request, body: bytes) -> None:
        verb, sandbox_id = _recognise(request)
        exchange = Exchange(verb=verb, sandbox_id=sandbox_id, body=body, fault=self._schedule.draw(verb))
        self.ledger.append(exchange)
        work = asyncio.create_task(self._play(connection, exchange, request, body))
        self._work[work] = exchange
        work.add_done_callback(self._work.pop)
        gone = asyncio.ensure_future(connection.gone.wait())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not work.done():
            if verb in STREAMS and exchange.fault.kind != "cut at once":
                work.cancel()
            raise _Cut
        if (error := work.exception()) is not None:
            raise error

    async def _play(self, connection: _Connection, exchange: Exchange, request: h11.Request, body: bytes) -> None:
        try:
            await self._inflict(connection, exchange, request, body)
        except (_Cut, OSError, h11.ProtocolError):
            # A client that left is no fault of the proxy's.
            if not connection.gone.is_set():
                raise
        except Exception as error:
            self.failures.append(error)
            raise

    async def _inflict(self, connection: _Connection, exchange: Exchange, request: h11.Request, body: bytes) -> None:
        fault = exchange.fault
        match fault.kind:
            case "delay before":
                await asyncio.sleep(fault.delay)
            case "cut before":
                raise connection.cut(fault.hard)
            case "limit":
                await connection.send(_limit(fault))
                return
            case "refuse before":
                await connection.send(_refusal(fault, request))
                return
            case "garbage before":
                await connection.send(_Answer(status=200, headers=[(b"Content-Type", b"text/html")], body=GARBAGE))
                return
            case "not http":
                connection.raw(b"SSH-2.0-OpenSSH_9.6\r\n")
                raise connection.cut(False)
            case "stall" if fault.hard:
                await connection.gone.wait()
                return
            case "close door":
                shut = asyncio.create_task(self._shut_for(2 * fault.delay))
                self._tasks.add(shut)
                shut.add_done_callback(self._tasks.discard)
            case "cut at once":
                # The server goes on, and the proxy with it; code runs to its end, and nobody hears of it.
                connection.cut(fault.hard)

        if exchange.verb == "list":
            await self._list(connection, exchange, request, body)
            return

        async with self._ask(exchange, request, body) as (head, chunks):
            kind = fault.kind
            if exchange.verb in STREAMS and kind in ("none", "delay before", "close door"):
                await connection.head(head)
                async for chunk in chunks:
                    await connection.data(chunk)
                await connection.over()
                return

            if exchange.verb in STREAMS and kind in ("truncate", "garbage line", "stall"):
                await self._break_stream(connection, head, chunks, fault)
                return

            head.body = b"".join([chunk async for chunk in chunks])
        self._learn(exchange, head)
        await self._spoil(connection, request, head, fault)

    async def _break_stream(
        self, connection: _Connection, head: _Answer, chunks: AsyncIterator[bytes], fault: Fault
    ) -> None:
        """Break an answer while it is being given, and leave the code to what the server does about it."""
        await connection.head(head)
        async for chunk in chunks:
            match fault.kind:
                case "garbage line":
                    await connection.data(chunk + b"\0<garbage>\n")
                    continue
                case "truncate" if fault.where < 0.5:
                    # In the middle of a line, and the server is told.
                    await connection.data(chunk[: int(len(chunk) * 2 * fault.where)])
                    raise connection.cut(fault.hard)
                case "stall":
                    await connection.data(chunk)
                    await connection.gone.wait()
                    return
                case _:
                    await connection.data(chunk)
        if fault.kind == "truncate":
            raise connection.cut(fault.hard)  # all of it but the end
        await connection.over()

    async def _spoil(self, connection: _Connection, request: h11.Request, answer: _Answer, fault: Fault) -> None:
        """Give the client what is left of a whole answer."""
        match fault.kind:
            case "cut after" | "cut at once":
                raise connection.cut(fault.hard)
            case "cut in head":
                connection.raw(b"HTTP/1.1 200 OK\r\nContent-Type: applic"[: 1 + int(36 * fault.where)])
                raise connection.cut(fault.hard)
            case "refuse after":
                await connection.send(_refusal(fault, request))
            case "garbage after":
                headers = [(b"Content-Type", b"text/html")]
                await connection.send(_Answer(status=max(200, answer.status), headers=headers, body=GARBAGE))
            case "truncate":
                # What has no body is cut before its last line end.
                whole = connection.bytes_of(answer)
                start = whole.index(b"\r\n\r\n") + 3
                connection.raw(whole[: start + int((len(whole) - start) * fault.where)])
                raise connection.cut(fault.hard)
            case "stall":
                await connection.gone.wait()
            case "trickle":
                whole = connection.bytes_of(answer)
                step = max(1, len(whole) // 30)
                for start in range(0, len(whole), step):
                    connection.raw(whole[start : start + step])
                    await asyncio.sleep(fault.delay / 30)
            case "delay after":
                await asyncio.sleep(fault.delay)
                await connection.send(answer)
            case _:
                await connection.send(answer)

    async def _list(self, connection: _Connection, exchange: Exchange, request: h11.Request, body: bytes) -> None:
        """One page, with the faults of listings."""
        fault = exchange.fault
        asked = {name: values[0] for name, values in parse_qs(urlsplit(request.target.decode()).query).items()}
        asked["limit"] = PAGE
        token = asked.get("nextToken", "")
        if token.startswith("shuffled-"):
            which, place = map(int, token.split("-")[1:])
            await self._spoil(connection, request, self._shuffled_page(which, place), fault)
            return

        if token == "again":
            del asked["nextToken"]
        if fault.kind == "unfiltered":
            asked = {name: value for name, value in asked.items() if name in ("limit", "nextToken")}
        if fault.kind == "shuffle" and not token:
            rows = []
            while True:
                answer = await self._page(exchange, request, asked)
                rows += json.loads(answer.body)
                if not (next_token := _next_token(answer)):
                    break
                asked["nextToken"] = next_token
            random.Random(fault.where).shuffle(rows)
            self._shuffled.append(rows)
            await connection.send(self._shuffled_page(len(self._shuffled) - 1, 0))
            return

        answer = await self._page(exchange, request, asked)
        if answer.status == 200 and token and fault.kind in ("repeat", "overlap"):
            first = await self._page(exchange, request, {n: v for n, v in asked.items() if n != "nextToken"})
            if fault.kind == "repeat":
                answer = _Answer(status=200, headers=[(b"X-Next-Token", token.encode())], body=first.body)
            else:
                answer.body = json.dumps([*json.loads(first.body), *json.loads(answer.body)]).encode()
        if fault.kind == "no end" and not _next_token(answer):
            answer.headers.append((b"X-Next-Token", b"again"))
        await self._spoil(connection, request, answer, fault)

    async def _page(self, exchange: Exchange, request: h11.Request, asked: dict[str, str]) -> _Answer:
        target = urlsplit(request.target.decode()).path + "?" + urlencode(asked)
        other = h11.Request(method=request.method, target=target, headers=list(request.headers))
        async with self._ask(exchange, other, b"") as (head, chunks):
            head.body = b"".join([chunk async for chunk in chunks])
        return head

    def _shuffled_page(self, which: int, place: int) -> _Answer:
        rows = self._shuffled[which]
        end = place + int(PAGE)
        more = [(b"X-Next-Token", f"shuffled-{which}-{end}".encode())] if rows[end:] else []
        headers = [(b"Content-Type", b"application/json"), *more]
        return _Answer(status=200, headers=headers, body=json.dumps(rows[place:end]).encode())

    @contextlib.asynccontextmanager
    async def _ask(
        self, exchange: Exchange, request: h11.Request, body: bytes
    ) -> AsyncIterator[tuple[_Answer, AsyncIterator[bytes]]]:
        """Ask the server; its answer's head, and its body as it comes. Leaving early breaks that connection."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            protocol = h11.Connection(h11.CLIENT)
            headers = [(n, v) for n, v in request.headers if n not in (b"connection", b"keep-alive")]
            asked = h11.Request(
                method=request.method, target=request.target, headers=[*headers, (b"Connection", b"close")]
            )
            exchange.forwarded = True
            data = [protocol.send(asked), protocol.send(h11.Data(data=body)) if body else b""]
            writer.write(b"".join(part for part in (*data, protocol.send(h11.EndOfMessage())) if part))

            async def events() -> AsyncGenerator[h11.Response | h11.Data, None]:
                while True:
                    event = protocol.next_event()
                    if event is h11.NEED_DATA:
                        protocol.receive_data(await reader.read(65536))
                    elif isinstance(event, (h11.Response, h11.Data)):
                        yield event
                    elif isinstance(event, h11.EndOfMessage):
                        return

            async with contextlib.aclosing(events()) as answer:
                head = await anext(answer)
                assert isinstance(head, h11.Response)
                exchange.status = head.status_code
                kept = [(n, v) for n, v in head.headers if n not in HOP]

                async def chunks() -> AsyncIterator[bytes]:
                    async for event in answer:
                        assert isinstance(event, h11.Data)
                        yield bytes(event.data)

                yield _Answer(status=head.status_code, headers=kept), chunks()
        finally:
            writer.close()

    def _learn(self, exchange: Exchange, answer: _Answer) -> None:
        with contextlib.suppress(ValueError):
            told = json.loads(answer.body)
            if isinstance(told, dict) and (token := told.get("envdAccessToken")):
                self.secrets.add(token)
                exchange.answer = told
            elif exchange.verb == "fork" and isinstance(told, list):
                self.secrets |= {copy["sandbox"]["envdAccessToken"] for copy in told if "sandbox" in copy}


class _Connection:
    """One client's connection: reads it all the time, so that the client's leaving is known at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.gone = asyncio.Event()
        self._reader = reader
        self._protocol = h11.Connection(h11.SERVER)
        self._arrived = asyncio.Event()
        self.pumping = asyncio.create_task(self._pump())

    async def _pump(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._reader.read(65536):
                if not self.gone.is_set():
                    self._protocol.receive_data(data)
                self._arrived.set()
        self.gone.set()
        self._arrived.set()

    async def request(self) -> tuple[h11.Request, bytes] | None:
        """The next request. None: there is no other."""
        request: h11.Request | None = None
        body = bytearray()
        while True:
            self._arrived.clear()
            match self._protocol.next_event():
                case h11.NEED_DATA:
                    if self.gone.is_set():
                        return None
                    await self._arrived.wait()
                case h11.Request() as head:
                    request = head
                case h11.Data() as data:
                    body += data.data
                case h11.EndOfMessage():
                    assert request is not None
                    return request, bytes(body)
                case _:
                    return None

    def next(self) -> None:
        """Be ready for another request."""
        self._protocol.start_next_cycle()

    async def send(self, answer: _Answer) -> None:
        """A whole answer."""
        self.raw(self.bytes_of(answer))
        await self._drain()

    def bytes_of(self, answer: _Answer) -> bytes:
        """A whole answer as it is on the wire."""
        length = [] if answer.status == 204 else [(b"Content-Length", str(len(answer.body)).encode())]
        head = h11.Response(status_code=answer.status, headers=[*answer.headers, *length], reason=b"")
        parts = [self._protocol.send(head)]
        if answer.status != 204 and answer.body:
            parts.append(self._protocol.send(h11.Data(data=answer.body)))
        parts.append(self._protocol.send(h11.EndOfMessage()))
        return b"".join(part for part in parts if part)

    async def head(self, answer: _Answer) -> None:
        """The head of an answer whose body comes in pieces."""
        headers = [*answer.headers, (b"Transfer-Encoding", b"chunked")]
        self.raw(self._protocol.send(h11.Response(status_code=answer.status, headers=headers)))
        await self._drain()

    async def data(self, data: bytes) -> None:
        """A piece of that body."""
        if data:
            self.raw(self._protocol.send(h11.Data(data=data)))
            await self._drain()

    async def over(self) -> None:
        """The end of that body."""
        self.raw(self._protocol.send(h11.EndOfMessage()))
        await self._drain()

    def raw(self, data: bytes | None) -> None:
        """Bytes, whatever they are."""
        if data and not self.gone.is_set():
            self.writer.write(data)

    async def _drain(self) -> None:
        if self.gone.is_set():
            raise _Cut
        await self.writer.drain()

    def cut(self, hard: bool) -> _Cut:
        """End the connection now, after what was written; raise the result to leave the exchange."""
        if not self.gone.is_set():
            sock = self.writer.get_extra_info("socket")
            if hard:
                # Linger for no time: the kernel sends a reset.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.writer.transport.abort()
            else:
                self.end()
        return _Cut()

    def end(self) -> None:
        """No more from this side."""
        with contextlib.suppress(OSError, RuntimeError):
            if not self.writer.transport.is_closing():
                self.writer.write_eof()


def _recognise(request: h11.Request) -> tuple[str, str | None]:
    path = urlsplit(request.target.decode()).path
    inside = dict(request.headers).get(b"e2b-sandbox-id", b"").decode() or None
    for (method, pattern), verb in _VERBS.items():
        if method == request.method.decode() and (match := re.fullmatch(pattern, path)):
            return verb, unquote(match[1]) if match.re.groups else inside
    return "other", inside


def _next_token(answer: _Answer) -> str | None:
    return next((value.decode() for name, value in answer.headers if name.lower() == b"x-next-token"), None)


def _limit(fault: Fault) -> _Answer:
    """429, as a gateway says it that has not even looked at the request."""
    asked = email.utils.formatdate(time.time() + 1, usegmt=True) if fault.retry_after == "date" else fault.retry_after
    headers = [(b"Retry-After", asked.encode())] if asked else []
    if fault.form == "json":
        body = b'{"code":429,"message":"Too many requests"}'
        return _Answer(status=429, headers=[*headers, (b"Content-Type", b"application/json")], body=body)
    return _Answer(status=429, headers=[*headers, (b"Content-Type", b"text/plain")], body=b"slow down\n")


def _refusal(fault: Fault, request: h11.Request) -> _Answer:
    """502, 503 or 504, as a gateway says it whose server failed it."""
    match fault.form:
        case "json":
            body = json.dumps({"code": fault.status, "message": "upstream failed"}).encode()
            kind = b"application/json"
        case "html":
            body, kind = b"<html><body><h1>Bad Gateway</h1></body></html>", b"text/html"
        case _:
            told = b"\r\n".join(name + b": " + value for name, value in sorted(request.headers, reverse=True))
            body, kind = b"The server failed to answer this request:\r\n" + told, b"text/plain"
    return _Answer(status=fault.status, headers=[(b"Content-Type", kind)], body=body)
