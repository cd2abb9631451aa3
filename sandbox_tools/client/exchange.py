"""One request to a sandbox's own address: its answer as it arrives, and why there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import httpx

from sandbox_tools.client.codec import decoded
from sandbox_tools.client.retries import may_have_happened
from sandbox_tools.client.sockets import Sockets, close
from sandbox_tools.errors import (
    APIError,
    ConnectError,
    ProtocolError,
    RequestTimeoutError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    TransportError,
    error_for_status,
)

if TYPE_CHECKING:
    from sandbox_tools.client.sandbox import Sandbox

LOOK_TIMEOUT = 10.0
"""Seconds to find out why something failed."""

REFUSAL_LIMIT = 64 * 1024

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer that is neither a stream nor a file: a listing of 100,000 files has fewer."""

# HTTP's word for each code of Connect, 500 for all others (connectrpc.com/docs/protocol).
_STATUSES = {
    "invalid_argument": 400,
    "failed_precondition": 400,
    "out_of_range": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "already_exists": 409,
    "aborted": 409,
    "resource_exhausted": 429,
    "unimplemented": 501,
}


async def exchange(
    sandbox: Sandbox,
    op: str,
    method: str,
    port: int,
    path: str,
    *,
    end: float | None = None,
    late: SandboxError | None = None,
    **content: Any,
) -> AsyncGenerator[bytes, None]:
    """Sends one request and gives the answer's bytes; closing the generator closes its connection, unless all has come.

    Args:
        op: The caller's verb, for errors.
        end: The loop's time at which `late` is raised. None: never.
        late: Also what the sandbox's own `deadline_exceeded` means.
        content: As for `Transport.open`.

    Raises:
        SandboxStateError: The sandbox is paused, or (`SandboxExpiredError`) gone.
        TransportError: The connection broke for another reason.
        APIError: The answer is no.
    """
    response: httpx.Response | None = None
    sockets = Sockets()
    try:
        # The limit is around each wait, not around a `yield`: it must not cancel the consumer's own code.
        async with asyncio.timeout_at(end) as limit:
            response = await sandbox._open(op, method, port, path, extensions=sockets.extensions, **content)
            if not response.is_success:
                raise refusal(sandbox, op, response, await _beginning(response), late)

        chunks = response.aiter_bytes()
        while True:
            async with asyncio.timeout_at(end) as limit:
                chunk = await anext(chunks, None)

            if chunk is None:
                sockets.forget()
                return

            yield chunk
    except (httpx.HTTPError, TransportError, TimeoutError) as error:
        if late is not None and limit.expired():
            raise late from None

        if error is late or isinstance(error, ConnectError):
            raise

        translated = sandbox._client.transport.translated
        failed = error if isinstance(error, SandboxError) else translated(error, op, sandbox.id)
        if (why := await cut(sandbox, failed)) is error:
            raise

        raise why from failed.__cause__ or error
    finally:
        if response is not None:
            await close(response)

        await sockets.aclose()


async def ask(
    sandbox: Sandbox, op: str, method: str, port: int, path: str, *, timeout: float = 60.0, **content: Any
) -> bytes:
    """The whole answer to one request.

    Args:
        timeout: Seconds for all of it, after which a `RequestTimeoutError` is raised.
        content: As for `exchange`.
    """
    msg = f"`{op}` got no answer within {timeout:g} s, so it may have happened. Look at what is there first."
    late = RequestTimeoutError(msg, op=op, sandbox_id=sandbox.id)
    end = asyncio.get_running_loop().time() + timeout
    return await whole(op, exchange(sandbox, op, method, port, path, end=end, late=late, **content), MAX_ANSWER)


async def whole(op: str, chunks: AsyncGenerator[bytes, None], limit: float) -> bytes:
    """All that comes, if it is not more than `limit` bytes."""
    body = bytearray()
    async with aclosing(chunks):
        async for chunk in chunks:
            body += chunk
            if len(body) > limit:
                msg = f"The answer to `{op}` has more than {limit} bytes. Ask for less."
                raise ProtocolError(msg, op=op)

    return bytes(body)


def refusal(
    sandbox: Sandbox, op: str, response: httpx.Response, body: bytes, late: SandboxError | None
) -> SandboxError:
    """What an answer means that is no success: the sandbox's own, or of what lies between; often plain text."""
    transport, status = sandbox._client.transport, response.status_code
    said: dict[str, Any] = {}
    with suppress(ProtocolError):
        said = decoded(body, op)

    if isinstance(said.get("code"), str):
        return failure(sandbox, op, said, late)

    text = transport.quoted(str(said.get("message") or body.decode("utf-8", "replace")))[:200]
    own = said.get("code") == status and text.startswith("path ")
    if own or (status == 404 and "Context" in text and "not found" in text):
        return _no(sandbox, op, status, text)

    about: dict[str, Any] = {"op": op, "sandbox_id": sandbox.id}
    if status == 404:
        # Not the word of the sandbox, so nobody may conclude from it that something is gone.
        msg = f"`{op}` was answered with status 404 and {text!r}. Check the sandbox's template and domain."
        return ProtocolError(msg, **about)

    if status == 409:
        return SandboxBusyError(f"The sandbox is just changing its state: {text!r}. Try again in a moment.", **about)

    if status == 502 and "was not found" in text:
        msg = f"The sandbox's address does not lead to it now, and `{op}` did not begin. Try again."
        return TransportError(msg, **about, retryable=True)

    msg = f"`{op}` was refused with status {status}: {text!r}. Look at the sandbox's state, then try again."
    error = transport.refused(error_for_status(status), msg, response, said.get("error_code"), op, sandbox.id)
    if may_have_happened(error):
        error.retryable = None  # a 503 of something in between, behind which the code may have run

    return error


def failure(sandbox: Sandbox, op: str, said: Any, late: SandboxError | None) -> SandboxError:
    """What Connect's error means."""
    said = said if isinstance(said, dict) else {"message": said}
    quoted = sandbox._client.transport.quoted
    code, text = quoted(str(said.get("code"))), quoted(str(said.get("message", "")))
    if code == "deadline_exceeded" and late is not None:
        return late

    if code in ("canceled", "unavailable"):
        msg = f"`{op}` was broken off by the sandbox: {text!r}. Look at what it has done."
        return TransportError(msg, op=op, sandbox_id=sandbox.id)

    return _no(sandbox, op, _STATUSES.get(code, 500), text, code)


async def cut(sandbox: Sandbox, error: SandboxError) -> SandboxError:
    """Why something broke off: the sandbox is gone, it is paused, or, if neither is known, `error` itself."""
    try:
        info = await sandbox._client.info(sandbox.id, deadline=LOOK_TIMEOUT)
    except SandboxExpiredError:
        msg = "The sandbox is gone: its time ran out or it was killed. Create a new one; its state is lost."
        return SandboxExpiredError(msg, op=error.op, sandbox_id=sandbox.id)
    except (APIError, TransportError):
        return error

    if info.state == "paused":
        msg = f"The sandbox is paused, with its state kept. Resume it, then look at what `{error.op}` has done."
        return SandboxStateError(msg, op=error.op, sandbox_id=sandbox.id)

    return error


async def _beginning(response: httpx.Response) -> bytes:
    body = bytearray()
    with suppress(TimeoutError, httpx.HTTPError):  # the status alone says enough
        async with asyncio.timeout(LOOK_TIMEOUT):
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > REFUSAL_LIMIT:
                    break

    return bytes(body)


def _no(sandbox: Sandbox, op: str, status: int, text: str, code: str | None = None) -> SandboxError:
    msg = f"`{op}` was refused inside the sandbox, which itself is there: {text!r}."
    return error_for_status(status)(msg, status_code=status, error_code=code, op=op, sandbox_id=sandbox.id)
