"""Connect's remote procedure calls over HTTP, in JSON alone: who calls, until when, and how each kind of call ends."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from sandbox_tools.guest.accounts import Account, UnknownUserError, account
from sandbox_tools.guest.envelopes import (
    MAX_MESSAGE,
    EnvelopeError,
    EnvelopeReader,
    Message,
    decode,
    encode,
    end,
    envelope,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

STATUSES = {
    "canceled": 499,
    "unknown": 500,
    "invalid_argument": 400,
    "deadline_exceeded": 504,
    "not_found": 404,
    "already_exists": 409,
    "permission_denied": 403,
    "resource_exhausted": 429,
    "failed_precondition": 400,
    "aborted": 409,
    "out_of_range": 400,
    "unimplemented": 501,
    "internal": 500,
    "unavailable": 503,
    "data_loss": 500,
    "unauthenticated": 401,
}
"""HTTP's word for each code, where a call is not a stream (connectrpc.com/docs/protocol)."""

UNARY = "application/json"
STREAM = "application/connect+json"

KEEPALIVE = 90.0
"""Seconds of silence before a keepalive, where the caller names none."""

BROKEN = "The server inside the sandbox failed at this call."


class RpcError(Exception):
    """Raised by handlers to end a call; the text says what happened and what to do.

    Args:
        code: One of `STATUSES`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a handler knows of its call."""

    message: Message
    """What was sent; empty where a stream of messages is."""
    account: Account
    """Who the call acts as."""
    request: Request
    keepalive: float
    """Seconds of silence before a keepalive."""
    timeout: float | None
    """Seconds that the caller gives the call from its beginning. None: no limit."""


Unary = Callable[[Call], Awaitable[Message]]
ServerStream = Callable[[Call], AsyncIterator[Message | bytes]]
ClientStream = Callable[[Call, AsyncIterator[Message]], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class Method:
    """One procedure, as Starlette serves it; made by `unary`, `server_stream` or `client_stream`."""

    respond: Callable[[Request], Awaitable[Response]]


def service(name: str, methods: Mapping[str, Method]) -> list[Route]:
    """The routes of a service, `/<name>/<method>`."""
    return [Route(f"/{name}/{each}", method.respond, methods=["POST"]) for each, method in methods.items()]


def unary(handler: Unary) -> Method:
    """One message in, one out. The handler is cancelled at the call's deadline, and when the caller leaves."""

    async def respond(request: Request) -> Response:
        try:
            _check_type(request, UNARY, "content-encoding")
            async with _limited(_timeout(request)) as limit:
                message = decode(await _body(request))
                async with _attended(request, limit):
                    reply = await handler(_call(request, message))
            return Response(encode(reply), media_type=UNARY)
        except Exception as error:
            return _refusal(error)

    return Method(respond)


def server_stream(handler: ServerStream, *, keepalive: Message | None = None) -> Method:
    """One message in, a stream out. The handler is closed at the call's deadline, and when the caller leaves.

    A handler that yields bytes has put its messages into envelopes itself; they go out as they are, in one piece.

    Args:
        keepalive: The message to send when there was none for as long as the caller says. None: none is sent.
    """

    async def respond(request: Request) -> Response:
        try:
            _check_type(request, STREAM, "connect-content-encoding")
            timeout = _timeout(request)
        except RpcError as error:
            return _refusal(error)

        try:
            async with _limited(timeout):
                call = _call(request, await _only_message(request))
        except Exception as error:
            return Response(end(_words(error)), media_type=STREAM)

        return _Stream(handler(call), call, keepalive)

    return Method(respond)


def client_stream(handler: ClientStream) -> Method:
    """A stream in, one message out. The handler is cancelled at the call's deadline."""

    async def respond(request: Request) -> Response:
        try:
            _check_type(request, STREAM, "connect-content-encoding")
            timeout = _timeout(request)
        except RpcError as error:
            return _refusal(error)

        try:
            async with _limited(timeout), contextlib.aclosing(_messages(request)) as messages:
                reply = await handler(_call(request, {}), messages)
        except Exception as error:
            return Response(end(_words(error)), media_type=STREAM)

        return Response(envelope(reply) + end(), media_type=STREAM)

    return Method(respond)


class _Stream(Response):
    """Sends a handler's messages until they end, the deadline passes or the caller leaves; then closes the handler.

    Starlette's own stream would cancel the handler's clean-up as well.
    """

    media_type = STREAM

    def __init__(self, messages: AsyncIterator[Message | bytes], call: Call, keepalive: Message | None) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._messages = messages
        self._interval = call.keepalive if keepalive is not None else None
        self._keepalive = envelope(keepalive or {})
        self._timeout = call.timeout
        self._written = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = sending.done()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if finished:
            sending.result()

    async def _send(self, send: Send) -> None:
        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        failure = None
        try:
            async with _limited(self._timeout):
                await self._pass_on(write)
        except Exception as error:
            failure = _words(error)
        await write(end(failure))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_on(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        keeping: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        try:
            async for message in self._messages:
                await write(message if isinstance(message, bytes) else envelope(message))
                self._written = loop.time()
                # The first message is the handler's, however long it takes.
                if keeping is None and self._interval is not None:
                    keeping = asyncio.create_task(self._keep_alive(write, self._interval))
        finally:
            if keeping is not None:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
            # What is no generator has nothing to be closed.
            if close := getattr(self._messages, "aclose", None):
                await close()

    async def _keep_alive(self, write: Callable[[bytes], Awaitable[None]], interval: float) -> None:
        # Each write is whole, so that this one may come between any two of the handler's.
        loop = asyncio.get_running_loop()
        while True:
            left = self._written + interval - loop.time()
            if left <= 0:
                await write(self._keepalive)
                self._written = loop.time()
            else:
                await asyncio.sleep(left)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def _limited(timeout: float | None) -> AsyncIterator[asyncio.Timeout]:
    """Raises `RpcError` when the time is over; None: never."""
    try:
        async with asyncio.timeout(timeout) as limit:
            yield limit
    except TimeoutError as error:
        if not limit.expired():
            raise

        msg = f"The call's deadline of {timeout} s has passed." if timeout is not None else "The caller has left."
        raise RpcError("deadline_exceeded" if timeout is not None else "canceled", msg) from error


@contextlib.asynccontextmanager
async def _attended(request: Request, limit: asyncio.Timeout) -> AsyncIterator[None]:
    """Brings the limit forward to the moment when the caller leaves; the request's body must have been read."""

    async def watch() -> None:
        await _left(request.receive)
        limit.reschedule(asyncio.get_running_loop().time())

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > MAX_MESSAGE:
            msg = f"The message has more than {MAX_MESSAGE} bytes. Send it in parts, or as a file."
            raise RpcError("resource_exhausted", msg)
    return bytes(body)


async def _messages(request: Request) -> AsyncGenerator[Message, None]:
    reader = EnvelopeReader()
    async for data in request.stream():
        for message in reader.feed(data):
            yield message
    reader.finish()


async def _only_message(request: Request) -> Message:
    only = None
    async with contextlib.aclosing(_messages(request)) as messages:
        async for message in messages:
            if only is not None:
                raise RpcError("invalid_argument", "The request has more than one message. Send one.")
            only = message
    if only is None:
        raise RpcError("invalid_argument", "The request has no message. Send one, in an envelope.")
    return only


def _call(request: Request, message: Message) -> Call:
    return Call(
        message=message,
        account=_account(request.headers.get("authorization", "")),
        request=request,
        keepalive=float(_number(request, "keepalive-ping-interval") or KEEPALIVE),
        timeout=_timeout(request),
    )


def _account(authorization: str) -> Account:
    scheme, _, credentials = authorization.partition(" ")
    name = None
    if scheme.lower() == "basic":
        try:
            name = base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[0]
        except ValueError as error:
            msg = "The `Authorization` header is not Basic's `<user>:` in base64. Send that, or none."
            raise RpcError("unauthenticated", msg) from error

    try:
        return account(name)
    except UnknownUserError as error:
        raise RpcError("unauthenticated", str(error)) from error


def _timeout(request: Request) -> float | None:
    """Seconds; envd takes 0 for no limit."""
    milliseconds = _number(request, "connect-timeout-ms")
    return milliseconds / 1000 if milliseconds else None


def _number(request: Request, header: str) -> int | None:
    text = request.headers.get(header)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        msg = f"The header `{header}` is {text!r}. Send a whole number of at most ten digits, or leave it out."
        raise RpcError("invalid_argument", msg)

    return int(text)


class _TypeError(RpcError):
    """Raised for a request whose type is not spoken here; HTTP has a status of its own for that."""


def _check_type(request: Request, wanted: str, encoding_header: str) -> None:
    given = request.headers.get("content-type", "")
    kind, _, parameters = given.partition(";")
    if kind.strip().lower() != wanted or parameters.strip().lower() not in ("", "charset=utf-8"):
        msg = f"The content type {given!r} is not spoken here; only JSON is. Send {wanted!r}."
        raise _TypeError("unimplemented", msg)

    encoding = request.headers.get(encoding_header, "identity").lower()
    if encoding not in ("identity", ""):
        msg = f"The encoding {encoding!r} is not spoken here. Send the body as it is, with the encoding `identity`."
        raise RpcError("unimplemented", msg)


def _words(error: Exception) -> tuple[str, str]:
    """Connect's code for an error, and the text that the caller gets."""
    if isinstance(error, RpcError | EnvelopeError):
        return error.code, str(error)
    if isinstance(error, ClientDisconnect):
        return "canceled", "The caller has left."

    logger.error("A call failed in the guest itself", exc_info=error)
    return "internal", BROKEN


def _refusal(error: Exception) -> Response:
    code, message = _words(error)
    status = 415 if isinstance(error, _TypeError) else STATUSES[code]
    return Response(encode({"code": code, "message": message}), status, media_type=UNARY)
