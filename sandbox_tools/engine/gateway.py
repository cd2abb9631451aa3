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

LINGER = 5.0
"""Seconds a server has to close a connection that it was asked to close, before it is broken off."""


async def forward(
    tunnel: Tunnel, address: Address, headers: Headers, scope: Scope, receive: Receive, send: Send
) -> None:
    """Pass one request and its answer through, both ways at once and each at the pace of its reader.

    A client that goes away takes its connection inside with it; a sandbox that goes away breaks the client's
    connection, so that nobody takes half an answer for a whole one.

    Args:
        headers: Of the request, as they go inwards.
    """
    method: str = scope["method"]
    answer = Answer(method)
    proceed = asyncio.Event()
    try:
        # A connection for each request: none is left over from before a pause, and nothing is ever sent twice.
        stream = tunnel.begin(address.port)
    except StreamResetError as error:
        await JSONResponse(explanation(error, tunnel, address), 502)(scope, receive, send)
        return

    inwards = asyncio.create_task(_send_in(stream, scope, headers, receive, proceed))
    try:
        try:
            body = await _head(stream, answer, proceed)
        except (StreamResetError, BadAnswerError) as error:
            if not inwards.done():
                await JSONResponse(explanation(error, tunnel, address), 502)(scope, receive, send)
            return

        # uvicorn takes the length of a body that can't be there for a promise.
        dropped = {b"content-length"} if answer.status in (204, 304) else set()
        outwards = [(name, value) for name, value in end_to_end(answer.headers) if name not in dropped]
        await send({"type": "http.response.start", "status": answer.status, "headers": outwards})
        while not answer.complete:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if data := await stream.read():
                body = answer.feed(data)
            else:
                answer.end()
                body = b""
        await send({"type": "http.response.body", "body": body, "more_body": False})
    except (StreamResetError, BadAnswerError):
        # Without a last message uvicorn closes the connection in the middle of the body: a broken stream.
        return
    finally:
        inwards.cancel()
        _part(stream, politely=answer.complete)


async def _head(stream: Stream, answer: Answer, proceed: asyncio.Event) -> bytes:
    while True:
        data = await stream.read()
        if not data:
            answer.end()
        body = answer.feed(data)
        if answer.status == 101:
            msg = "it switched to another protocol, which it was not asked for"
            raise BadAnswerError(msg)
        if answer.continued:
            proceed.set()
        if answer.status:
            return body


async def _send_in(stream: Stream, scope: Scope, headers: Headers, receive: Receive, proceed: asyncio.Event) -> None:
    """Send the request, then wait until the client is gone, which breaks the stream."""
    names = {name for name, _ in headers}
    chunked = b"transfer-encoding" in names
    inward = [(name, value) for name, value in end_to_end(headers) if not (chunked and name == b"content-length")]
    inward += [(b"host", b"localhost")] if b"host" not in names else []
    inward += [(b"transfer-encoding", b"chunked")] if chunked else []
    gone = False
    try:
        await stream.write(request_head(scope["method"], _target(scope), [*inward, (b"connection", b"close")]))
        if b"expect" in names:
            # Asking for the body is what makes uvicorn ask the client for it.
            try:
                async with asyncio.timeout(_EXPECTING):
                    await proceed.wait()
            except TimeoutError:
                pass
        more = True
        while more and not gone:
            message = await receive()
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
        gone = (await receive())["type"] == "http.disconnect"
    stream.close("the client went away")


def _part(stream: Stream, *, politely: bool) -> None:
    """End the stream: in good order where everything was said, and by force where it was not."""
    if not politely:
        stream.close("the exchange was broken off")
        return

    stream.write_eof()
    if not stream.got_eof:
        asyncio.get_running_loop().call_later(LINGER, stream.close, "it was not closed from inside")


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
