"""A sandbox's own address: whatever is sent to it goes through its tunnel, unread, to a port inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpcore
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from sandbox_tools.engine.routing import Address
from sandbox_tools.engine.tunnel import Tunnel, TunnelBackend

# RFC 9110 section 7.6.1: these are between two hops and not passed on.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)


async def forward(
    tunnel: Tunnel,
    address: Address,
    headers: list[tuple[bytes, bytes]],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Pass one request and its answer through, each at the pace of its reader.

    A client that goes away takes its connection inside with it; a sandbox that goes away breaks the client's
    connection, so that nobody takes half an answer for a whole one.
    """
    gone = asyncio.Event()
    request = httpcore.Request(
        scope["method"],
        httpcore.URL(scheme=b"http", host=b"sandbox", port=address.port, target=_target(scope)),
        headers=[(name, value) for name, value in headers if name not in _HOP_BY_HOP],
        content=_body(receive, gone),
    )
    # A connection for each request: none is left over from before a pause, and nothing is ever sent twice.
    connection = httpcore.AsyncHTTPConnection(request.url.origin, network_backend=TunnelBackend(tunnel))
    exchange = asyncio.create_task(_exchange(connection, request, address, scope, receive, send))
    watch = asyncio.create_task(_disconnect(receive, gone))
    try:
        await asyncio.wait((exchange, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        exchange.cancel()
        await asyncio.wait((exchange, watch))
        await connection.aclose()
    if not exchange.cancelled():
        exchange.result()


async def _exchange(
    connection: httpcore.AsyncHTTPConnection,
    request: httpcore.Request,
    address: Address,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    try:
        response = await connection.handle_async_request(request)
    except httpcore.ConnectError:
        await _port_closed(address)(scope, receive, send)
        return
    except (httpcore.NetworkError, httpcore.ProtocolError):
        await _not_found(address)(scope, receive, send)
        return

    headers = [(name.lower(), value) for name, value in response.headers if name.lower() not in _HOP_BY_HOP]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    try:
        async for chunk in response.aiter_stream():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except (httpcore.NetworkError, httpcore.ProtocolError):
        # Without a last message uvicorn closes the connection in the middle of the body: a broken stream.
        return
    finally:
        await response.aclose()

    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive, done: asyncio.Event) -> AsyncIterator[bytes]:
    try:
        more = True
        while more:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                return
            more = message.get("more_body", False)
            if body := message.get("body", b""):
                yield body
    finally:
        done.set()


async def _disconnect(receive: Receive, body_read: asyncio.Event) -> None:
    # Two readers of one `receive` would take each other's messages.
    await body_read.wait()
    while (await receive())["type"] != "http.disconnect":
        continue


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return path + b"?" + query if query else path


def _not_found(address: Address) -> JSONResponse:
    body = {"sandboxId": address.sandbox_id, "message": "The sandbox was not found", "code": 502}
    return JSONResponse(body, 502)


def _port_closed(address: Address) -> JSONResponse:
    message = "The sandbox is running but port is not open"
    return JSONResponse({"sandboxId": address.sandbox_id, "message": message, "port": address.port, "code": 502}, 502)
