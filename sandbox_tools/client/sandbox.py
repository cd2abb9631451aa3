"""One sandbox in hand: runs code in it, and pauses, wakes and ends it through its client."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from sandbox_tools.client import sentinel
from sandbox_tools.client.codec import EventDecoder, ExecutionCollector
from sandbox_tools.client.transport import close, retry_after, translate
from sandbox_tools.errors import (
    APIError,
    ConfigError,
    ConnectError,
    ExecutionTimeoutError,
    NotFoundError,
    ProtocolError,
    RequestTimeoutError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    StateLostError,
    TransportError,
    error_for_status,
)
from sandbox_tools.models import (
    DEFAULT_TIMEOUT,
    ENVD_PORT,
    INTERPRETER_PORT,
    CodeContext,
    Ended,
    ErrorBody,
    Execution,
    ExecutionEvent,
    SandboxGrant,
    SandboxInfo,
)

if TYPE_CHECKING:
    from sandbox_tools.client.client import Client
    from sandbox_tools.client.sentinel import Sentinel

T = TypeVar("T")

LOOK_TIMEOUT = 10.0
"""Seconds to find out why a stream broke."""

LAST_BYTES_TIMEOUT = 2.0
"""Seconds between the last event and the end of its stream."""

UNREADY = frozenset((409, 502, 503, 504))
"""What a provider's edge answers while it does not lead to the sandbox yet."""

READY_LIMIT = 5.0
"""Seconds that a sandbox which was just resumed is given to answer at its own address."""

REFUSAL_LIMIT = 64 * 1024


class _Contexts(BaseModel):
    """The list as PPIO may give it."""

    contexts: list[CodeContext]


_CONTEXT = TypeAdapter(CodeContext)
_CONTEXTS: TypeAdapter[list[CodeContext] | _Contexts] = TypeAdapter(list[CodeContext] | _Contexts)


class Sandbox:
    """A sandbox that `Client.create` or `Client.connect` gave; usable until it is killed, and again after `resume`."""

    def __init__(self, client: Client, grant: SandboxGrant) -> None:
        self._client = client
        self._grant = grant
        self.id = client.dialect.sandbox_id(grant.sandbox_id, grant.client_id)
        self.template_id = grant.template_id
        self.sentinel: Sentinel | None = None
        """What the last pause left behind to be checked, for another process as well. None: nothing was left."""
        self._checked: Sentinel | None = None
        self._planting = asyncio.Lock()
        self._asleep = False
        """Whether it was paused and nothing has been sent to it since."""

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
                response = await self._send("run_code", "POST", INTERPRETER_PORT, "/execute", json=body)
        except TimeoutError:
            raise self._too_long(timeout) from None

        decoder = EventDecoder()
        try:
            if response.status_code != 200:
                raise await self._refusal(response, "run_code")

            chunks = response.aiter_bytes()
            while True:
                # The limit is around each read, not around a `yield`: it must not cancel the consumer's own code.
                try:
                    async with asyncio.timeout_at(end):
                        chunk = await anext(chunks, None)
                except TimeoutError:
                    raise self._too_long(timeout) from None
                except httpx.HTTPError as error:
                    raise await self._cut(translate(error, op="run_code", sandbox_id=self.id), "run_code") from error

                for event in decoder.close() if chunk is None else decoder.feed(chunk):
                    yield event
                    if isinstance(event, Ended):
                        await _drain(chunks)
                        return

                if chunk is None:
                    msg = "The answer to `run_code` ended before the code did. Run something small to see what is left."
                    raise await self._cut(ProtocolError(msg, op="run_code", sandbox_id=self.id), "run_code")
        finally:
            await close(response)

    async def create_context(self, *, language: str | None = None, cwd: str | None = None) -> CodeContext:
        """Makes a code context: variables of its own, for `run_code(context=...)`.

        If this is cancelled or its answer is lost, a context may exist that `list_contexts` shows.

        Args:
            language: None: Python.
            cwd: Where its code begins. None: the sandbox's own default.
        """
        body = {name: value for name, value in (("language", language), ("cwd", cwd)) if value is not None}
        answer = await self._ask("create_context", "POST", INTERPRETER_PORT, "/contexts", json=body)
        return self._parsed(_CONTEXT, answer, "create_context")

    async def list_contexts(self) -> list[CodeContext]:
        """All code contexts, the default ones included."""
        answer = await self._ask("list_contexts", "GET", INTERPRETER_PORT, "/contexts")
        rows = self._parsed(_CONTEXTS, answer, "list_contexts")
        return rows if isinstance(rows, list) else rows.contexts

    async def restart_context(self, context_id: str) -> None:
        """Ends a context's code and variables, and starts it afresh under the same id.

        Raises:
            NotFoundError: There is no such context.
        """
        path = f"/contexts/{urllib.parse.quote(context_id, safe='')}/restart"
        await self._ask("restart_context", "POST", INTERPRETER_PORT, path)

    async def remove_context(self, context_id: str) -> bool:
        """Ends a context. False: there was none of that id."""
        path = f"/contexts/{urllib.parse.quote(context_id, safe='')}"
        try:
            await self._ask("remove_context", "DELETE", INTERPRETER_PORT, path)
        except NotFoundError:
            return False

        return True

    def url(self, port: int) -> str:
        """The URL of a server inside that listens on `port`, for any HTTP client that sends `headers(port)` with it.

        Raises:
            ConfigError: It is reached through the local engine's Unix socket only; the message says how.
        """
        if socket := self._client.transport.socket:
            msg = (
                f"Port {port} of this sandbox has no address of its own: it is reached over the Unix socket "
                f"{str(socket)!r}, at `http://localhost` and with `headers({port})`. For an address, serve the engine "
                "with `sandbox-tools serve --host 127.0.0.1 --port 8080` and set `SANDBOX_TOOLS_API_URL` to it."
            )
            raise ConfigError(msg, op="url", sandbox_id=self.id)

        return self._client.dialect.public_url(self._client.address, self._grant, port)

    def host(self, port: int) -> str:
        """The host of `url(port)`, with its own port where it has one and without a scheme; raises as `url` does."""
        return httpx.URL(self.url(port)).netloc.decode()

    def headers(self, port: int) -> dict[str, str]:
        """What a request to `url(port)` must bring; it holds secrets where the sandbox asks for them."""
        return self._at(port)[1]

    async def pause(self, *, memory: bool = True) -> bool:
        """As `Client.pause`, but leaves a mark in memory and in a file before it, which `resume` looks for.

        Only `Client(verify_state=False)` leaves none. Where it cannot be left, the sandbox is paused all the same.
        """
        if self._client.verify_state and not self._asleep:
            async with self._planting:
                self.sentinel = await sentinel.plant(self, memory=memory)
        elif self.sentinel and not memory:
            self.sentinel = self.sentinel.model_copy(update={"memory": False})

        paused = await self._client.pause(self.id, memory=memory)
        self._asleep = True
        return paused

    async def resume(self, *, timeout: int = DEFAULT_TIMEOUT) -> None:
        """Wakes it when it is paused; as `Client.connect`, into this object.

        Raises:
            StateLostError: It runs and can be used, but its memory or files are older than what was last paused here.
        """
        self._grant, woken = await self._client.grant(self.id, timeout=timeout)
        planted = self.sentinel
        # An answer that was lost, or somebody else, may have woken it before: then it runs, and nobody has looked.
        if woken or planted is not self._checked:
            await self.until_ready()
            if planted:
                try:
                    await sentinel.check(self, planted)
                except StateLostError:
                    self.sentinel = self._checked = None
                    raise
                self._checked = planted

    async def until_ready(self) -> None:
        """Returns once a sandbox that was just resumed answers at its own address, or after `READY_LIMIT` seconds."""
        url, headers = self._at(ENVD_PORT)
        pause = 0.02
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_LIMIT):
                while True:
                    try:
                        response = await self._client.transport.open(
                            "resume", "GET", url + "/health", headers=headers, sandbox_id=self.id
                        )
                    except TransportError:
                        pass
                    else:
                        await close(response)
                        if response.status_code not in UNREADY:
                            return

                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.5)

    async def kill(self) -> bool:
        """As `Client.kill`."""
        return await self._client.kill(self.id)

    async def info(self) -> SandboxInfo:
        """As `Client.info`."""
        return await self._client.info(self.id)

    async def set_timeout(self, timeout: int) -> None:
        """As `Client.set_timeout`."""
        await self._client.set_timeout(self.id, timeout)

    def _at(self, port: int) -> tuple[str, dict[str, str]]:
        """The URL of one of its ports, and the headers that a request to it needs."""
        self._asleep = False  # what is sent there may wake it
        client = self._client
        url = client.dialect.sandbox_url(client.address, self._grant, port)
        return url, client.dialect.sandbox_headers(self._grant, port)

    async def _send(self, op: str, method: str, port: int, path: str, **content: Any) -> httpx.Response:
        """Sends one request to one of its ports, on a connection of its own; the caller reads and closes the answer."""
        url, headers = self._at(port)
        try:
            return await self._client.transport.open(
                op, method, url + path, headers=headers, sandbox_id=self.id, **content
            )
        except ConnectError:
            raise
        except TransportError as error:
            raise await self._cut(error, op) from error

    async def _ask(self, op: str, method: str, port: int, path: str, *, timeout: float = 60.0, **content: Any) -> bytes:
        """Sends one request to one of its ports and gives the body of the 2xx answer, which must be small."""
        try:
            async with asyncio.timeout(timeout) as limit:
                response = await self._send(op, method, port, path, **content)
                try:
                    if not response.is_success:
                        raise await self._refusal(response, op)

                    return await response.aread()
                except httpx.HTTPError as error:
                    raise await self._cut(translate(error, op=op, sandbox_id=self.id), op) from error
                finally:
                    await close(response)
        except TimeoutError as error:
            if not limit.expired():
                raise

            msg = f"`{op}` got no answer within {timeout:g} s, so it may have happened. Look at the sandbox first."
            raise RequestTimeoutError(msg, op=op, sandbox_id=self.id) from error

    def _parsed(self, adapter: TypeAdapter[T], answer: bytes, op: str) -> T:
        try:
            return adapter.validate_json(answer)
        except ValidationError:
            msg = f"`{op}` was answered with {answer[:200]!r}, which is not of the protocol. Check the template."
            raise ProtocolError(msg, op=op, sandbox_id=self.id) from None

    def _too_long(self, timeout: float | None) -> ExecutionTimeoutError:
        msg = (
            f"The code ran longer than its `timeout` of {timeout:g} s and was interrupted; its variables are kept. "
            "Pass a longer `timeout`, or let it work in the background."
        )
        return ExecutionTimeoutError(msg, op="run_code", sandbox_id=self.id)

    async def _refusal(self, response: httpx.Response, op: str) -> SandboxError:
        """The error for an answer of the sandbox's own address that is no success; often plain text."""
        text = await self._text(response)
        status = response.status_code
        if status == 404 and "not found" in text and "Context" in text:
            msg = f"There is no such code context: {text!r}. Leave `context` out, or make a new one."
            return NotFoundError(msg, op=op, sandbox_id=self.id)

        if status == 404 and "does not exist" in text:
            msg = f"There is no such file: {text!r}. Check the path; the sandbox itself is there."
            return NotFoundError(msg, op=op, sandbox_id=self.id)

        if status == 404:
            # Not the word of the sandbox, so nobody may conclude from it that something is gone.
            msg = f"`{op}` was answered with status 404 and {text!r}. Check the sandbox's template and domain."
            return ProtocolError(msg, op=op, sandbox_id=self.id)

        if status == 409:
            msg = f"The sandbox is just changing its state: {text!r}. Try again in a moment."
            return SandboxBusyError(msg, op=op, sandbox_id=self.id)

        if status == 502 and "was not found" in text:
            msg = f"The sandbox's address does not lead to it now, and `{op}` did not begin. Try again."
            return await self._cut(TransportError(msg, op=op, sandbox_id=self.id, retryable=True), op)

        cls = error_for_status(status)
        msg = f"`{op}` was refused with status {status}: {text!r}. Look at the sandbox's state, then try again."
        wait = retry_after(response.headers.get("retry-after"))
        return cls(msg, status_code=status, retry_after=wait, op=op, sandbox_id=self.id)

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

    async def _cut(self, error: SandboxError, op: str) -> SandboxError:
        """Why `op` broke off: the sandbox is gone, it is paused, or, if neither is known, `error` itself."""
        try:
            info = await self._client.info(self.id, deadline=LOOK_TIMEOUT)
        except NotFoundError:
            msg = "The sandbox is gone: its time ran out or it was killed. Create a new one; its state is lost."
            return SandboxExpiredError(msg, op=op, sandbox_id=self.id)
        except (APIError, TransportError):
            return error

        if info.state == "paused":
            msg = f"The sandbox is paused, with its state kept. Resume it, then look at what `{op}` has done."
            return SandboxStateError(msg, op=op, sandbox_id=self.id)

        return error


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    # A server that is still ending its answer must not take the close for an interrupt.
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(LAST_BYTES_TIMEOUT):
            async for _ in chunks:
                pass
