"""Calls of envd, the daemon of each sandbox: Connect's protocol, in JSON."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import httpx

from sandbox_tools.client.codec import ENVELOPE, EnvelopeDecoder, decoded
from sandbox_tools.client.exchange import ask, cut, exchange, failure
from sandbox_tools.client.transport import CONNECT_TIMEOUT
from sandbox_tools.errors import ExecutionTimeoutError, ProtocolError, TransportError
from sandbox_tools.models import ENVD_PORT

if TYPE_CHECKING:
    from sandbox_tools.client.sandbox import Sandbox

Message = dict[str, Any]

KEEPALIVE = 50
"""Seconds of silence after which envd is asked for a sign of life in a stream."""

SILENCE = httpx.Timeout(3.0 * KEEPALIVE, connect=CONNECT_TIMEOUT)
"""For a connection to count as broken when not a byte has moved for so long."""

GRACE = 1.0
"""Seconds beyond a stream's timeout that envd, which is told of it, has to say so itself."""

# Reading changes nothing, so that it may be asked for again after a broken connection.
_READS = frozenset({"process.Process/List", "filesystem.Filesystem/Stat", "filesystem.Filesystem/ListDir"})


async def unary(
    sandbox: Sandbox, call: str, message: Message, *, op: str, user: str | None = None, timeout: float = 60.0
) -> Message:
    """One message there and one back. Only a pure read is repeated after a byte has left.

    Args:
        call: Such as `"filesystem.Filesystem/Stat"`.
        op: The caller's verb, for errors.
        user: Who it is done as. None: the sandbox's default user.
        timeout: Seconds for all of it.

    Raises:
        APIError: envd said no; `error_code` is Connect's word for why.
        RequestTimeoutError, SandboxStateError, TransportError: As `exchange.ask`.
    """
    headers, data = _headers("application/json", user, timeout), json.dumps(message).encode()
    more: dict[str, Any] = {"headers": headers, "content": data, "idempotent": call in _READS}
    return decoded(await ask(sandbox, op, "POST", ENVD_PORT, f"/{call}", timeout=timeout, **more), op)


async def stream(
    sandbox: Sandbox, call: str, message: Message, *, op: str, user: str | None = None, timeout: float | None = None
) -> AsyncGenerator[Message, None]:
    """One message there and many back, on a connection of its own, which closing the generator closes.

    Args:
        timeout: Seconds until envd ends it; it is broken off here where envd does not. None: no limit.

    Raises:
        ExecutionTimeoutError: It took longer than `timeout`. Others as in `unary`.
    """
    limit = f" of {timeout:g} s" if timeout else ""
    msg = f"`{op}` ran longer than its `timeout`{limit} and was ended. Pass a longer one, or None for no limit."
    late = ExecutionTimeoutError(msg, op=op, sandbox_id=sandbox.id)
    data = json.dumps(message).encode()
    content = ENVELOPE.pack(0, len(data)) + data
    headers = _headers("application/connect+json", user, timeout)
    headers |= {"Connect-Content-Encoding": "identity", "Keepalive-Ping-Interval": str(KEEPALIVE)}
    end = None if timeout is None else asyncio.get_running_loop().time() + timeout + GRACE
    more: dict[str, Any] = {"headers": headers, "content": content, "end": end, "late": late, "timeout": SILENCE}
    decoder = EnvelopeDecoder(op)
    async with aclosing(exchange(sandbox, op, "POST", ENVD_PORT, f"/{call}", **more)) as chunks:
        async for chunk in chunks:
            for each, last in decoder.feed(chunk):
                if not last:
                    yield each
                elif "error" not in each:
                    return
                else:
                    error = failure(sandbox, op, each["error"], late)
                    raise await cut(sandbox, error) if isinstance(error, TransportError) else error

    msg = f"The answer to `{op}` ended before its end was told. Look at what it has done."
    raise await cut(sandbox, ProtocolError(msg, op=op, sandbox_id=sandbox.id))


def _headers(content_type: str, user: str | None, timeout: float | None) -> dict[str, str]:
    headers = {"Content-Type": content_type, "Connect-Protocol-Version": "1"}
    if timeout is not None:
        headers["Connect-Timeout-Ms"] = str(math.ceil(timeout * 1000))

    if user is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:'.encode()).decode()}"

    return headers
