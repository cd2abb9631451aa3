"""One sandbox in hand: runs code in it, and pauses, wakes and ends it through its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import ValidationError

from sandbox_tools.client.codec import EventDecoder, ExecutionCollector
from sandbox_tools.client.transport import close, retry_after, translate
from sandbox_tools.errors import (
    APIError,
    ConfigError,
    ExecutionTimeoutError,
    NotFoundError,
    ProtocolError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    TransportError,
    error_for_status,
)
from sandbox_tools.models import (
    DEFAULT_TIMEOUT,
    INTERPRETER_PORT,
    Ended,
    ErrorBody,
    Execution,
    ExecutionEvent,
    SandboxGrant,
    SandboxInfo,
)

if TYPE_CHECKING:
    from sandbox_tools.client.client import Client

LOOK_TIMEOUT = 10.0
"""Seconds to find out why a stream broke."""

LAST_BYTES_TIMEOUT = 2.0
"""Seconds between the last event and the end of its stream."""

REFUSAL_LIMIT = 64 * 1024


class Sandbox:
    """A sandbox that `Client.create` or `Client.connect` gave; usable until it is killed, and again after `resume`."""

    def __init__(self, client: Client, grant: SandboxGrant) -> None:
        self._client = client
        self._grant = grant
        self.id = client.dialect.sandbox_id(grant.sandbox_id, grant.client_id)
        self.template_id = grant.template_id

    async def run_code(
        self,
        code: str,
        *,
        context: str | None = None,
        language: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = 300.0,
        on_event: Callable[[ExecutionEvent], None] | None = None,
    ) -> Execution:
        """Runs code to its end and collects what it put out; code that raises is a result with a `failure`.

        Code is never sent twice. If this is cancelled, the connection is closed, which interrupts the code and keeps
        its variables.

        Args:
            context: The id of a code context. None: the default one of `language`.
            language: None: Python. Not together with `context`.
            env: Set for this code only.
            timeout: Seconds from now until the code is interrupted. None: no limit.
            on_event: Called with each event as it arrives.

        Raises:
            ExecutionTimeoutError: The code ran longer than `timeout`; `partial` holds what it had put out.
            SandboxExpiredError: The sandbox is gone.
            SandboxStateError: It is paused; `resume` it.
            NotFoundError: There is no such context (the sandbox itself is there).
            TransportError: The connection broke, so how far the code has run is not known.
        """
        collector = ExecutionCollector()
        events = self.stream_code(code, context=context, language=language, env=env, timeout=timeout)
        async with aclosing(events):
            try:
                async for event in events:
                    collector.add(event)
                    if on_event:
                        on_event(event)
            except ExecutionTimeoutError as error:
                error.partial = collector.execution()
                raise

        return collector.execution()

    async def stream_code(
        self,
        code: str,
        *,
        context: str | None = None,
        language: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = 300.0,
    ) -> AsyncGenerator[ExecutionEvent, None]:
        """Runs code and gives its events as they arrive, the last one an `Ended`.

        Closing the generator closes the connection, which interrupts the code. Arguments and errors are those of
        `run_code`; the time the consumer takes counts too.
        """
        if timeout is not None and timeout <= 0:
            msg = f"`timeout` is {timeout!r}. Pass a positive number of seconds, or None for no limit."
            raise ConfigError(msg, op="run_code", sandbox_id=self.id)

        if context is not None and language is not None:
            msg = "A context has a language already. Pass `context` or `language`, not both."
            raise ConfigError(msg, op="run_code", sandbox_id=self.id)

        body = {"code": code, "context_id": context, "language": language, "env_vars": dict(env) if env else None}
        end = None if timeout is None else asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(end):
                response = await self._open(body)
        except TimeoutError:
            raise self._too_long(timeout) from None

        decoder = EventDecoder()
        try:
            if response.status_code != 200:
                raise await self._refusal(response)

            chunks = response.aiter_bytes()
            while True:
                # The limit is around each read, not around a `yield`: it must not cancel the consumer's own code.
                try:
                    async with asyncio.timeout_at(end):
                        chunk = await anext(chunks, None)
                except TimeoutError:
                    raise self._too_long(timeout) from None
                except httpx.HTTPError as error:
                    raise await self._cut(translate(error, op="run_code", sandbox_id=self.id)) from error

                for event in decoder.close() if chunk is None else decoder.feed(chunk):
                    yield event
                    if isinstance(event, Ended):
                        await _drain(chunks)
                        return

                if chunk is None:
                    msg = "The answer to `run_code` ended before the code did. Run something small to see what is left."
                    raise await self._cut(ProtocolError(msg, op="run_code", sandbox_id=self.id))
        finally:
            await close(response)

    async def pause(self) -> bool:
        """As `Client.pause`."""
        return await self._client.pause(self.id)

    async def resume(self, *, timeout: int = DEFAULT_TIMEOUT) -> None:
        """Wakes it when it is paused; as `Client.connect`, into this object."""
        self._grant, _ = await self._client.grant(self.id, timeout=timeout)

    async def kill(self) -> bool:
        """As `Client.kill`."""
        return await self._client.kill(self.id)

    async def info(self) -> SandboxInfo:
        """As `Client.info`."""
        return await self._client.info(self.id)

    async def set_timeout(self, timeout: int) -> None:
        """As `Client.set_timeout`."""
        await self._client.set_timeout(self.id, timeout)

    async def _open(self, body: Mapping[str, Any]) -> httpx.Response:
        dialect = self._client.dialect
        return await self._client.transport.open(
            "run_code",
            dialect.sandbox_url(self._client.address, self._grant, INTERPRETER_PORT) + "/execute",
            headers=dialect.sandbox_headers(self._grant, INTERPRETER_PORT),
            body=body,
            sandbox_id=self.id,
        )

    def _too_long(self, timeout: float | None) -> ExecutionTimeoutError:
        msg = (
            f"The code ran longer than its `timeout` of {timeout:g} s and was interrupted; its variables are kept. "
            "Pass a longer `timeout`, or let it work in the background."
        )
        return ExecutionTimeoutError(msg, op="run_code", sandbox_id=self.id)

    async def _refusal(self, response: httpx.Response) -> SandboxError:
        """The error for an answer of the sandbox's own address that is no stream; often plain text."""
        text = await self._text(response)
        status = response.status_code
        if status == 404 and "not found" in text and "Context" in text:
            msg = f"There is no such code context: {text!r}. Leave `context` out, or make a new one."
            return NotFoundError(msg, op="run_code", sandbox_id=self.id)

        if status == 404:
            # Not the word of the sandbox, so nobody may conclude from it that something is gone.
            msg = f"`run_code` was answered with status 404 and {text!r}. Check the sandbox's template and domain."
            return ProtocolError(msg, op="run_code", sandbox_id=self.id)

        if status == 409:
            msg = f"The sandbox is just changing its state: {text!r}. Try again in a moment."
            return SandboxBusyError(msg, op="run_code", sandbox_id=self.id)

        if status == 502 and "was not found" in text:
            msg = "The sandbox's address does not lead to it now, and the code was not run. Try again."
            return await self._cut(TransportError(msg, op="run_code", sandbox_id=self.id, retryable=True))

        cls = error_for_status(status)
        msg = f"`run_code` was refused with status {status}: {text!r}. Look at the sandbox's state, then try again."
        wait = retry_after(response.headers.get("retry-after"))
        return cls(msg, status_code=status, retry_after=wait, op="run_code", sandbox_id=self.id)

    async def _text(self, response: httpx.Response) -> str:
        body = bytearray()
        try:
            async with asyncio.timeout(LOOK_TIMEOUT):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > REFUSAL_LIMIT:
                        break
        except (TimeoutError, httpx.HTTPError):
            pass  # The status alone says enough.

        try:
            return ErrorBody.model_validate_json(bytes(body)).message
        except ValidationError:
            return body.decode("utf-8", "replace")[:200]

    async def _cut(self, error: SandboxError) -> SandboxError:
        """Why the code's stream broke: the sandbox is gone, it is paused, or, if neither is known, `error` itself."""
        try:
            info = await self._client.info(self.id, deadline=LOOK_TIMEOUT)
        except NotFoundError:
            msg = "The sandbox is gone: its time ran out or it was killed. Create a new one; its state is lost."
            return SandboxExpiredError(msg, op="run_code", sandbox_id=self.id)
        except (APIError, TransportError):
            return error

        if info.state == "paused":
            msg = "The sandbox is paused, with its state kept. Resume it, then look at what the code has done."
            return SandboxStateError(msg, op="run_code", sandbox_id=self.id)

        return error


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    # A server that is still ending its answer must not take the close for an interrupt.
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(LAST_BYTES_TIMEOUT):
            async for _ in chunks:
                pass
