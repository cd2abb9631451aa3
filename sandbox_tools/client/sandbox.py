"""One sandbox in hand: runs code in it, and pauses, wakes and ends it through its client."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx

from sandbox_tools import telemetry
from sandbox_tools.client import sentinel
from sandbox_tools.client.codec import EventDecoder, ExecutionCollector
from sandbox_tools.client.commands import Commands
from sandbox_tools.client.exchange import ask, cut, exchange
from sandbox_tools.client.files import Files
from sandbox_tools.client.sockets import close
from sandbox_tools.client.transport import KEEPALIVE_EXPIRY
from sandbox_tools.client.wire import parsed, path_part, positive, was_there
from sandbox_tools.errors import (
    ConfigError,
    ExecutionTimeoutError,
    ProtocolError,
    SandboxError,
    StateLostError,
    TransportError,
)
from sandbox_tools.models import (
    DEFAULT_TIMEOUT,
    ENVD_PORT,
    INTERPRETER_PORT,
    CodeContext,
    Ended,
    Execution,
    ExecutionEvent,
    Metric,
    SandboxGrant,
    SandboxInfo,
    SnapshotInfo,
)

if TYPE_CHECKING:
    from sandbox_tools.client.client import Client

LAST_BYTES_TIMEOUT = 2.0
"""Seconds between the last event and the end of its stream."""

UNREADY = frozenset((409, 502, 503, 504))
"""What a provider's edge answers while it does not lead to the sandbox yet."""

READY_LIMIT = 5.0
"""Seconds that a sandbox which was just resumed is given to answer at its own address."""


class Sandbox:
    """A sandbox that `Client.create` or `Client.connect` gave; usable until it is killed, and again after `resume`."""

    def __init__(self, client: Client, grant: SandboxGrant) -> None:
        self._client = client
        self._use(grant)
        self.id = client.dialect.sandbox_id(grant.sandbox_id, grant.client_id)
        self.template_id = grant.template_id
        self.commands = Commands(self)
        self.files = Files(self)
        self.sentinel: sentinel.Sentinel | None = None
        """What the last pause left behind to be checked, for another process as well. None: nothing was left."""
        self._checked: sentinel.Sentinel | None = None
        self._planting = asyncio.Lock()
        self._asleep = False
        """Whether it was paused and nothing has been sent to it since."""
        self._resumed_at = -math.inf

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
        with telemetry.span("sandbox.exec", {"sandbox_id": self.id}):
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
        op = "run_code"
        positive(op, "timeout", timeout, self.id)
        if context is not None and language is not None:
            msg = "A context has a language already. Pass `context` or `language`, not both."
            raise ConfigError(msg, op=op, sandbox_id=self.id)

        limit = f"its `timeout` of {timeout or 0:g} s"
        msg = f"The code ran longer than {limit} and was interrupted; its variables are kept. Pass a longer one."
        late = ExecutionTimeoutError(msg, op=op, sandbox_id=self.id)
        end = None if timeout is None else asyncio.get_running_loop().time() + timeout
        body = {"code": code, "context_id": context, "language": language, "env_vars": dict(env) if env else None}
        decoder = EventDecoder(sandbox_id=self.id)
        chunks = exchange(self, op, "POST", INTERPRETER_PORT, "/execute", json=body, end=end, late=late)
        async with aclosing(chunks):
            while True:
                chunk = await anext(chunks, None)
                for event in decoder.close() if chunk is None else decoder.feed(chunk):
                    yield event
                    if isinstance(event, Ended):
                        await _drain(chunks)
                        return

                if chunk is None:
                    msg = "The answer to `run_code` ended before the code did. Run something small to see what is left."
                    raise await cut(self, ProtocolError(msg, op=op, sandbox_id=self.id))

    async def create_context(self, *, language: str | None = None, cwd: str | None = None) -> CodeContext:
        """Makes a code context: variables of its own, for `run_code(context=...)`.

        If this is cancelled or its answer is lost, a context may exist that `list_contexts` shows.

        Args:
            language: None: Python.
            cwd: Where its code begins. None: the sandbox's own default.
        """
        op = "create_context"
        body = {name: value for name, value in (("language", language), ("cwd", cwd)) if value is not None}
        answer = await ask(self, op, "POST", INTERPRETER_PORT, "/contexts", json=body)
        return parsed(CodeContext, answer, op, self.id)

    async def list_contexts(self) -> list[CodeContext]:
        """All code contexts, the default ones included."""
        op = "list_contexts"
        rows = parsed(object, await ask(self, op, "GET", INTERPRETER_PORT, "/contexts"), op, self.id)
        # PPIO may put the list into an object.
        return parsed(list[CodeContext], rows.get("contexts") if isinstance(rows, dict) else rows, op, self.id)

    async def restart_context(self, context_id: str) -> None:
        """Ends a context's code and variables, and starts it afresh under the same id.

        Raises:
            NotFoundError: There is no such context.
        """
        op = "restart_context"
        await ask(self, op, "POST", INTERPRETER_PORT, f"/contexts/{path_part(op, context_id)}/restart")

    async def remove_context(self, context_id: str) -> bool:
        """Ends a context. False: there was none of that id."""
        op = "remove_context"
        return await was_there(ask(self, op, "DELETE", INTERPRETER_PORT, f"/contexts/{path_part(op, context_id)}"))

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

        return self._client.dialect.sandbox_url(self._client.address, self._grant, port, public=True)

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
        self._client.dialect.require(f"pause(memory={memory})")
        await self.plant(memory=memory)
        paused = await self._client.pause(self.id, memory=memory)
        self._asleep = True
        return paused

    async def plant(self, *, memory: bool = True) -> sentinel.Sentinel | None:
        """Leaves that mark for a pause that somebody else will make, such as the server's timer.

        Returns:
            What `verify` takes, here or in another process. None: there is nothing to look for.
        """
        if self._client.verify_state and not self._asleep:
            async with self._planting:
                self.sentinel = await sentinel.plant(self, memory=memory)
        elif self.sentinel and not memory:
            self.sentinel = self.sentinel.model_copy(update={"memory": False})

        return self.sentinel

    async def verify(self, planted: sentinel.Sentinel) -> bool:
        """Whether what was planted has come back; False: nobody could look.

        Raises:
            StateLostError: It runs and can be used, but its memory or files are older than that mark.
        """
        self.sentinel = planted
        try:
            found = await sentinel.check(self, planted)
        except StateLostError:
            self.sentinel = self._checked = None
            raise

        self._checked = planted
        return found

    async def resume(self, *, timeout: int = DEFAULT_TIMEOUT) -> None:
        """Wakes it when it is paused; as `Client.connect`, into this object.

        Raises:
            StateLostError: It runs and can be used, but its memory or files are older than what was last paused here.
        """
        grant, resumed = await self._client.grant(self.id, timeout=timeout)
        self._use(grant)
        planted = self.sentinel
        # An answer that was lost, or somebody else, may have woken it before: then it runs, and nobody has looked.
        if resumed or planted is not self._checked:
            await self._until_ready()
            if planted:
                await self.verify(planted)

    async def _until_ready(self) -> None:
        """Returns once a sandbox that was just resumed answers at its own address, or after `READY_LIMIT` seconds."""
        self._resumed_at = time.monotonic()
        pause = 0.02
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_LIMIT):
                while True:
                    with suppress(TransportError):
                        response = await self._open("resume", "GET", ENVD_PORT, "/health", timeout=1.0)
                        await close(response)
                        if response.status_code not in UNREADY:
                            return

                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.5)

    async def freeze(self) -> bool:
        """As `Client.freeze`."""
        return await self._client.freeze(self.id)

    async def kill(self) -> bool:
        """As `Client.kill`."""
        return await self._client.kill(self.id)

    async def info(self) -> SandboxInfo:
        """As `Client.info`."""
        return await self._client.info(self.id)

    async def set_timeout(self, timeout: int) -> None:
        """As `Client.set_timeout`."""
        await self._client.set_timeout(self.id, timeout)

    async def metrics(self, *, start: datetime | None = None, end: datetime | None = None) -> list[Metric]:
        """As `Client.metrics`."""
        return await self._client.metrics(self.id, start=start, end=end)

    async def snapshot(self, *, name: str | None = None) -> SnapshotInfo:
        """As `Client.snapshot`."""
        return await self._client.snapshot(self.id, name=name)

    async def fork(self, *, count: int = 1, timeout: int = DEFAULT_TIMEOUT) -> list[Sandbox | SandboxError]:
        """As `Client.fork`."""
        return await self._client.fork(self.id, count=count, timeout=timeout)

    def _use(self, grant: SandboxGrant) -> None:
        """Takes this grant, whose tokens the client's messages leave out, whichever client it is from."""
        self._grant = grant
        self._client.transport.keep_secret(grant.envd_access_token, grant.traffic_access_token)

    def _at(self, port: int) -> tuple[str, dict[str, str]]:
        """The URL of one of its ports, and the headers that a request to it needs."""
        self._asleep = False  # what is sent there may wake it
        self._use(self._grant)
        dialect = self._client.dialect
        url = dialect.sandbox_url(self._client.address, self._grant, port)
        return url, dialect.sandbox_headers(self._grant, port)

    async def _open(
        self, op: str, method: str, port: int, path: str, *, headers: Mapping[str, str] | None = None, **content: Any
    ) -> httpx.Response:
        """As `Transport.open`, at one of its ports."""
        url, own = self._at(port)
        content["headers"] = {"Accept-Encoding": "identity", **own, **(headers or {})}
        # A connection from before the pause may be kept still, which leads nowhere.
        fresh = time.monotonic() - self._resumed_at < KEEPALIVE_EXPIRY
        return await self._client.transport.open(op, self.id, method, url + path, fresh=fresh, **content)


async def _drain(chunks: AsyncGenerator[bytes, None]) -> None:
    # A server that is still ending its answer must not take the close for an interrupt.
    with suppress(TimeoutError, SandboxError):
        async with asyncio.timeout(LAST_BYTES_TIMEOUT):
            async for _ in chunks:
                pass
