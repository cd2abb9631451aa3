"""A sandbox's own address: whatever is sent to it goes through its tunnel, unread, to a port inside."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from sandbox_tools.engine.http1 import Answer, BadAnswerError, Headers, end_to_end, request_head
from sandbox_tools.engine.routing import Address
from sandbox_tools.engine.tunnel import Tunnel, is_refusal
from sandbox_tools.guest.mux import Stream, StreamResetError

NOT_FOUND = "The sandbox was not found"
"""What E2B's SDKs look for to tell that a sandbox is gone."""

PORT_CLOSED = "The sandbox is running but port is not open"
"""What they look for to tell that nothing listens."""

# Seconds that a server which was asked for its leave before the body may stay silent; then the body is sent all the
# same (RFC 9110 section 10.1.1), as servers that don't know the question never answer it.
_EXPECTING = 1.0


async def forward(
    tunnel: Tunnel, address: Address, headers: Headers, scope: Scope, receive: Receive, send: Send
) -> None:
    """Pass one request and its answer through, both ways at once and each at the pace of its reader.

    A client that goes away takes its connection inside with it; a sandbox that goes away breaks the client's
    connection, so that nobody takes half an answer for a whole one.

    Args:
        headers: Of the request, as they go inwards.
    """
    exchange = _Exchange(tunnel, address, headers, scope, receive, send)
    if exchange.repeatable and (kept := tunnel.kept.take(address.port)) is not None and await exchange.on(kept):
        return

    try:
        stream = tunnel.begin(address.port)
    except StreamResetError as error:
        await exchange.refuse(error)
    else:
        await exchange.on(stream, last=True)


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, tunnel: Tunnel, address: Address, headers: Headers, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._tunnel = tunnel
        self._address = address
        self._headers = headers
        self._scope = scope
        self._receive = receive
        self._send = send
        self._names = dict(headers)
        bodiless = self._names.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in self._names
        self.repeatable: bool = scope["method"] == "GET" and bodiless
        """Whether it may be sent on a connection that may turn out to be closed, and then again on another one: what
        is safe to repeat (RFC 9110 section 9.2.2) and is sure to need no more than one message either way."""
        self._answer = Answer(scope["method"])
        self._proceed = asyncio.Event()
        self._sent = False

    async def on(self, stream: Stream, *, last: bool = False) -> bool:
        """Have it on a connection. False: that was closed before any answer came, and nobody has been told anything.

        Args:
            last: There is no other connection to have it on: it is refused where it would be False.
        """
        answer, self._sent = self._answer, False
        inwards = asyncio.create_task(self._ask(stream))
        try:
            try:
                body = await self._head(stream)
            except (StreamResetError, BadAnswerError) as error:
                client_left = inwards.done()
                if not (last or answer.begun or client_left):
                    return False
                if not client_left:
                    await self.refuse(error)
                return True

            # uvicorn takes the length of a body that can't be there for a promise.
            dropped = {b"content-length"} if answer.status in (204, 304) else set()
            outwards = [(name, value) for name, value in end_to_end(answer.headers) if name not in dropped]
            await self._send({"type": "http.response.start", "status": answer.status, "headers": outwards})
            while not answer.complete:
                if body:
                    await self._send({"type": "http.response.body", "body": body, "more_body": True})
                if data := await stream.read():
                    body = answer.feed(data)
                else:
                    answer.end()
                    body = b""
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        except (StreamResetError, BadAnswerError):
            # Without a last message uvicorn closes the connection in the middle of the body: a broken stream.
            pass
        finally:
            inwards.cancel()
            self._part(stream)
        return True

    async def refuse(self, error: StreamResetError | BadAnswerError) -> None:
        """Say why there is no answer."""
        body = explanation(error, self._tunnel, self._address)
        await JSONResponse(body, 502)(self._scope, self._receive, self._send)

    async def _head(self, stream: Stream) -> bytes:
        answer = self._answer
        while True:
            data = await stream.read()
            if not data:
                answer.end()
            body = answer.feed(data)
            if answer.status == 101:
                msg = "it switched to another protocol, which it was not asked for"
                raise BadAnswerError(msg)
            if answer.continued:
                self._proceed.set()
            if answer.status:
                return body

    async def _ask(self, stream: Stream) -> None:
        """Send the request, then wait until the client is gone, which breaks the stream."""
        chunked = b"transfer-encoding" in self._names
        inward = end_to_end(self._headers)
        inward = [(name, value) for name, value in inward if not (chunked and name == b"content-length")]
        inward += [(b"host", b"localhost")] if b"host" not in self._names else []
        inward += [(b"transfer-encoding", b"chunked")] if chunked else []
        inward += [(b"connection", b"close")] if not self.repeatable else []
        gone = False
        try:
            await stream.write(request_head(self._scope["method"], _target(self._scope), inward))
            self._sent = True
            if b"expect" in self._names:
                # Asking for the body is what makes uvicorn ask the client for it.
                try:
                    async with asyncio.timeout(_EXPECTING):
                        await self._proceed.wait()
                except TimeoutError:
                    pass
            more = not self.repeatable
            while more and not gone:
                message = await self._receive()
                gone = message["type"] == "http.disconnect"
                more = message.get("more_body", False)
                if body := message.get("body", b""):
                    await stream.write(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)
            if chunked and not gone:
                await stream.write(b"0\r\n\r\n")
        except StreamResetError:
            # The server wants no more of it, or the sandbox is gone: the answer, or its absence, says which.
            pass
        while not gone:
            gone = (await self._receive())["type"] == "http.disconnect"
        stream.close("the client went away")

    def _part(self, stream: Stream) -> None:
        """Keep the connection or end it in good order where everything was said, and by force where it was not."""
        answer = self._answer
        if not answer.complete:
            stream.close("the exchange was broken off")
        elif self.repeatable and self._sent and answer.persistent and answer.status not in (204, 304):
            self._tunnel.kept.keep(stream)
        else:
            self._tunnel.kept.end(stream)


def explanation(error: StreamResetError | BadAnswerError, tunnel: Tunnel, address: Address) -> dict[str, object]:
    """What is said, with 502, in place of an answer that never came; as E2B's edge does."""
    body: dict[str, object] = {"sandboxId": address.sandbox_id, "code": 502}
    if not tunnel.attached:
        return body | {"message": NOT_FOUND}
    if isinstance(error, StreamResetError) and is_refusal(error):
        return body | {"message": PORT_CLOSED, "port": address.port}
    return body | {"message": f"The sandbox is running but its port {address.port} gave no answer: {error}"}


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return path + b"?" + query if query else path
