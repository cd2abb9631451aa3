"""A WebSocket to a port of a sandbox: its handshake is looked at, and all that follows goes through byte by byte."""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httptools
from starlette.datastructures import Headers

from sandbox_tools.engine import http1
from sandbox_tools.engine.front import Front, Passage
from sandbox_tools.engine.gateway import explanation
from sandbox_tools.engine.kept import LINGER
from sandbox_tools.engine.routing import Asked
from sandbox_tools.guest.mux import Stream, StreamResetError
from sandbox_tools.guest.transport import Relay, StreamTransport, break_off

if TYPE_CHECKING:
    import uvicorn
    from uvicorn.server import ServerState


log = logging.getLogger(__name__)


class WebSocketProtocol(Relay):
    """What uvicorn hands a connection to that asks to become a WebSocket.

    Nothing of the WebSocket's own protocol is spoken here: extensions, pings, close codes and fragments are between
    the client and the server inside, and a sandbox that goes away breaks the connection without a closing frame.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__()
        self._front: Front = config.loaded_app
        self._state = server_state
        self._transport: asyncio.Transport | None = None
        self._answering: asyncio.Task[None] | None = None
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is this protocol's from now on."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._state.connections.add(self)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """The request's head, which uvicorn has read already; then whatever is for the server inside."""
        if self.peer is not None:
            super().data_received(data)
        elif self._answering is None:
            self._answering = asyncio.create_task(self._answer(data))
            self._state.tasks.add(self._answering)
            self._answering.add_done_callback(self._answered)
        else:
            # Nothing is to be sent before the handshake is answered (RFC 6455 section 4.1), and little is put up with.
            self._early += data
            if len(self._early) > http1.MAX_HEAD and self._transport is not None:
                break_off(self._transport)

    def eof_received(self) -> bool:
        """The client sends no more, and has had its closing frame if it waited for one."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and so is its connection inside, once what it said has got there."""
        self._state.connections.discard(self)
        super().connection_lost(exc)
        if self.peer is not None:
            asyncio.get_running_loop().call_later(LINGER, self.peer.abort)
        elif self._answering is not None:
            self._answering.cancel()

    def shutdown(self) -> None:
        """The engine stops: sandboxes are paused, and connections to them break."""
        if self._transport is not None:
            break_off(self._transport)

    def _answered(self, answering: asyncio.Task[None]) -> None:
        self._state.tasks.discard(answering)
        if not answering.cancelled() and (error := answering.exception()) is not None:
            log.error("A WebSocket's handshake failed", exc_info=error)
            self.shutdown()

    async def _answer(self, head: bytes) -> None:
        client = self._transport
        assert client is not None
        method, target, headers = _parse(head)
        path, _, query = target.partition(b"?")
        asked = Asked(
            method=method, path=unquote(path.decode()), query=query.decode("latin-1"), headers=Headers(raw=headers)
        )
        way = await self._front.admit(asked)
        if isinstance(way, Passage):
            await self._pass(client, way, method, target)
        elif way is None:
            _say(client, 404, {"code": 404, "message": "The control plane has no WebSockets."})
        else:
            _say(client, way.status, way.body)

    async def _pass(self, client: asyncio.Transport, passage: Passage, method: str, target: bytes) -> None:
        upgrade = [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
        head = http1.request_head(method, target, [*http1.end_to_end(passage.headers), *upgrade])
        answer = http1.Answer(method)
        try:
            stream = passage.tunnel.begin(passage.address.port)
        except StreamResetError as error:
            _say(client, 502, explanation(error, passage.tunnel, passage.address))
            return

        try:
            await stream.write(head)
            rest = b""
            while not answer.status:
                if not (data := await stream.read()):
                    answer.end()
                rest = answer.feed(data)
        except (StreamResetError, http1.BadAnswerError) as error:
            stream.close()
            _say(client, 502, explanation(error, passage.tunnel, passage.address))
        except asyncio.CancelledError:
            stream.close("the client went away")
            raise
        else:
            if answer.status == 101:
                self._couple(client, stream, answer, rest)
            else:
                await _decline(client, stream, answer, rest)

    def _couple(self, client: asyncio.Transport, stream: Stream, answer: http1.Answer, rest: bytes) -> None:
        """From here on both sides speak with each other."""
        inner = StreamTransport(stream, Relay(client))
        self.peer = inner
        client.write(_head(101, answer.headers) + rest)
        inner.start()
        if self._early:
            inner.write(self._early)


async def _decline(client: asyncio.Transport, stream: Stream, answer: http1.Answer, body: bytes) -> None:
    """Pass on what a server says in place of a WebSocket."""
    try:
        while not answer.complete and len(body) < http1.MAX_HEAD:
            if data := await stream.read():
                body += answer.feed(data)
            else:
                answer.end()
    except (StreamResetError, http1.BadAnswerError):
        break_off(client)
        return
    finally:
        stream.close()
    kept = [(name, value) for name, value in http1.end_to_end(answer.headers) if name != b"content-length"]
    framing = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    client.write(_head(answer.status, [*kept, *framing]) + body)
    client.close()


def _say(client: asyncio.Transport, status: int, body: dict[str, object]) -> None:
    content = json.dumps(body).encode()
    length = (b"content-length", b"%d" % len(content))
    client.write(_head(status, [(b"content-type", b"application/json"), length, (b"connection", b"close")]) + content)
    client.close()


def _head(status: int, headers: http1.Headers) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    lines = [b"HTTP/1.1 %d %b" % (status, phrase.encode()), *(name + b": " + value for name, value in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _parse(head: bytes) -> tuple[str, bytes, http1.Headers]:
    """A head as uvicorn writes it anew from what it has parsed: method, target, headers."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    method, url, _ = first.split(b" ", 2)
    parsed = httptools.parse_url(url)
    target = (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")
    headers = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    return method.decode(), target, headers
