"""The client: makes sandboxes, finds them again, and copies them, in whichever dialect the provider speaks."""

from __future__ import annotations

import asyncio
import builtins
import itertools
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import httpx

from sandbox_tools.client import wire
from sandbox_tools.client.control import ControlPlane
from sandbox_tools.client.dialects import Dialect, choose
from sandbox_tools.client.local import LocalEngine
from sandbox_tools.client.retries import may_have_happened
from sandbox_tools.client.sandbox import Sandbox
from sandbox_tools.client.transport import IDEMPOTENCY_KEY, LONG_REQUEST, Transport, in_time
from sandbox_tools.errors import (
    APIError,
    ConfigError,
    ConflictError,
    ProtocolError,
    SandboxError,
    SandboxNotFoundError,
    SandboxStateError,
    TransportError,
    error_for_status,
)
from sandbox_tools.models import (
    DEFAULT_TEMPLATE,
    DEFAULT_TIMEOUT,
    CloneResult,
    ConnectRequest,
    CreateRequest,
    ForkResult,
    SandboxGrant,
)
from sandbox_tools.paths import state_directory

CREATE_KEY = "sandbox-tools/create"
"""The metadata under which a sandbox bears the idempotency key of its create."""

_FORKED: Any = list[ForkResult] | CloneResult | None
"""What fork may answer; null is an empty list."""


class Client(ControlPlane, AbstractAsyncContextManager["Client"]):
    """Creates sandboxes and finds them again; an async context manager that owns its connections.

    No I/O happens before the first call. The local provider's engine is started by the first call that does not
    find it, which takes minutes once, while it builds its template.

    Args:
        provider: `"e2b"`, `"ppio"`, `"novita"`, `"ucloud"`, `"local"`, or a `Dialect`. None: the one whose key (or,
            for a cluster of your own, `E2B_API_URL`) the environment holds, else `"local"`.
        api_key: None: from the environment (`E2B_API_KEY` and the like).
        api_url: None: from the environment, else the provider's own, else the local engine's Unix socket.
        request_timeout: Seconds for one call to the control plane with all its repeats. Those that may move gigabytes
            (create, connect, fork, snapshot) have at least 600 s, and a pause has what the sandbox's size demands.
        verify_state: Whether `Sandbox.pause` leaves a mark in the sandbox and `Sandbox.resume` looks for it: a small
            request to the sandbox before the pause, and two at once after the resume.
        state_dir: Which local engine. None: `paths.state_directory()`. Other providers do not use it.
        on_wait: Called with a sentence while the local engine is being started. None: nobody is told.
        transport: Replaces the network, for tests.

    Raises:
        ConfigError: No or several providers fit, or a setting cannot work.
    """

    def __init__(
        self,
        *,
        provider: str | Dialect | None = None,
        api_key: str | None = None,
        api_url: str | None = None,
        request_timeout: float = 60.0,
        verify_state: bool = True,
        state_dir: Path | None = None,
        on_wait: Callable[[str], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        wire.positive(None, "request_timeout", request_timeout)
        self.dialect, self.address = choose(provider, api_key=api_key, api_url=api_url)
        engine = None
        if self.dialect.default_domain is None and not self.address.url_named and transport is None:
            engine = LocalEngine(state_dir or state_directory(), on_wait=on_wait)

        self.verify_state = verify_state
        self._long = max(request_timeout, LONG_REQUEST)
        # Of the time that a create has, the end in which it is looked for if its answer was lost.
        self._look = min(request_timeout, self._long / 10)
        super().__init__(Transport(self.address, request_timeout=request_timeout, engine=engine, inner=transport))

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections. Sandboxes live on, and so does a local engine."""
        await self.transport.aclose()

    async def create(
        self,
        template: str | None = None,
        *,
        timeout: int = DEFAULT_TIMEOUT,
        auto_pause: bool = True,
        pause_memory: bool = True,
        auto_resume: bool = False,
        metadata: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        secure: bool | None = None,
        internet: bool = True,
        idempotency_key: str | None = None,
    ) -> Sandbox:
        """Starts a new sandbox.

        If the answer is lost, the sandbox is looked for, and taken if it is there; a second one is never made. If
        this is cancelled, nothing more is sent, and a sandbox may be left that only its timeout ends, unless it is
        created again with the same `idempotency_key`.

        Args:
            template: A template's or a snapshot's id or name. None: the provider's code interpreter.
            timeout: Seconds from now until the server pauses or kills it; renew with `set_timeout`.
            auto_pause: Pause at the timeout. False: kill.
            pause_memory: False: that pause keeps files only, and its processes end; only with `auto_pause`.
            auto_resume: Have any traffic wake it when it is paused; only with `auto_pause`.
            env: Set for all code and commands.
            secure: Whether it asks for its token. None: as the provider's own SDK (not on PPIO's and Novita's
                legacy domains, elsewhere it does). False is refused where all do (E2B, the local engine).
            internet: Whether it may reach the internet (with the local engine: if that allows it).
            idempotency_key: 1 to 255 lower-case letters, digits and hyphens: gives the sandbox that an earlier create
                with that key has made, if it is there. Not for creates at the same time. None: a new one.

        Raises:
            CapacityError, RateLimitError: There is no room now; nothing was started, unless `retryable` is None.
            SandboxError: Where `retryable` is None, the sandbox may yet come to be. The message names the key.
        """
        key = uuid.uuid4().hex if idempotency_key is None else idempotency_key
        if not re.fullmatch("[a-z0-9-]{1,255}", key):
            msg = f"`idempotency_key` is {key!r}. Pass 1 to 255 lower-case letters, digits and hyphens."
            raise ConfigError(msg, op="create")

        if auto_resume and not (auto_pause and pause_memory):
            msg = "`auto_resume` wakes what was paused with its memory. Leave it out, or pass `auto_pause=True` too."
            raise ConfigError(msg, op="create")

        if not pause_memory:
            self.dialect.require("pause(memory=False)")

        request = wire.body(
            CreateRequest,
            "create",
            template_id=template or DEFAULT_TEMPLATE,
            timeout=wire.positive("create", "timeout", timeout),
            auto_pause=auto_pause,
            auto_pause_memory=pause_memory or not auto_pause,
            auto_resume={"enabled": True} if auto_resume else None,
            metadata={**(metadata or {}), CREATE_KEY: key},
            env_vars=dict(env or {}),
            allow_internet_access=None if internet else False,
        )
        body = self.dialect.create_body(request, secure=secure)
        left = await self._left("create", self._long - self._look)
        if idempotency_key is not None:
            async with in_time("create", left()):
                if made := await self._made_with(key, timeout):
                    return made

        headers = {IDEMPOTENCY_KEY: key} if self.dialect.idempotency_header else {}
        more: dict[str, Any] = {"body": body, "headers": headers, "deadline": left()}
        try:
            response = await self._send("create", "POST", self.dialect.create_path, idempotent=False, **more)
            return Sandbox(self, wire.parsed(SandboxGrant, response.content, "create"))
        except (TransportError, APIError) as error:
            if error.retryable is not None and not may_have_happened(error):
                raise

            # A server that has answered for itself is done; one behind a broken connection may still be at it.
            done = isinstance(error, ProtocolError) or (isinstance(error, APIError) and error.status_code == 500)
            if made := await self._look_for(key, timeout, done=done):
                return made

            error.retryable = None
            error.message += f" It may yet come to be: `create` with `idempotency_key={key!r}` looks for it first."
            error.args = (error.message,)
            raise

    async def connect(self, sandbox_id: str, *, timeout: int = DEFAULT_TIMEOUT) -> Sandbox:
        """Finds a sandbox, and wakes it when it is paused.

        Args:
            timeout: Seconds from now until its end; never shortens that of a running one.

        Raises:
            SandboxNotFoundError: It is gone.
        """
        grant, resumed = await self.grant(sandbox_id, timeout=timeout)
        sandbox = Sandbox(self, grant)
        if resumed:
            await sandbox._until_ready()

        return sandbox

    async def grant(self, sandbox_id: str, *, timeout: int) -> tuple[SandboxGrant, bool]:
        """What `connect` and `Sandbox.resume` share: wakes the sandbox and gives the right to use it.

        Returns:
            Also whether it may just have been resumed; False means that it certainly ran before.
        """
        body = wire.body(ConnectRequest, "connect", timeout=wire.positive("connect", "timeout", timeout)).model_dump()
        body.update(self.dialect.connect_with)
        path = self.dialect.connect_path
        response = await self._send("connect", "POST", path, sandbox_id, body=body, deadline=self._long)
        # Behind a repeated attempt, "it runs" may be the work of an earlier one whose answer was lost.
        resumed = response.status_code != 200 or response.extensions["attempts"] > 1
        return wire.parsed(SandboxGrant, response.content, "connect", sandbox_id), resumed

    async def fork(
        self, sandbox_id: str, *, count: int = 1, timeout: int = DEFAULT_TIMEOUT
    ) -> builtins.list[Sandbox | SandboxError]:
        """Makes copies of a running sandbox, memory and all; for each the sandbox, or why there is none.

        If this is cancelled or its answer is lost, there may be copies that only their timeout ends; they bear the
        metadata of the original.

        Args:
            count: How many, 1 to 100.
            timeout: Seconds from now until the end of each.

        Raises:
            SandboxNotFoundError: The original is gone.
            ConflictError, SandboxStateError: It is paused.
        """
        if not 1 <= count <= 100:
            msg = f"`count` of `fork` is {count!r}. Pass 1 to 100."
            raise ConfigError(msg, op="fork", sandbox_id=sandbox_id)

        body = {"timeout": wire.positive("fork", "timeout", timeout), "count": count, **self.dialect.fork_with}
        more: dict[str, Any] = {"body": body, "idempotent": False, "deadline": self._long}
        response = await self._send("fork", "POST", self.dialect.fork_path, sandbox_id, running=True, **more)
        made = wire.parsed(_FORKED, response.content, "fork", sandbox_id)
        results = [ForkResult(sandbox=each) for each in made.sandboxes] if isinstance(made, CloneResult) else made or []
        results += [ForkResult()] * (count - len(results))
        return [self._copy(result, sandbox_id) for result in results]

    def _copy(self, result: ForkResult, sandbox_id: str) -> Sandbox | SandboxError:
        if result.sandbox is not None:
            return Sandbox(self, result.sandbox)

        code, said = (result.error.code, result.error.message) if result.error else (500, "no reason given")
        msg = f"A copy could not be made: {self.transport.quoted(said)!r}. Fork again if you need it."
        # A 404 is about something else than the original, which must not be taken for gone.
        cls = APIError if code == 404 else error_for_status(code)
        return cls(msg, status_code=code, op="fork", sandbox_id=sandbox_id)

    async def _made_with(self, key: str, timeout: int) -> Sandbox | None:
        """The sandbox whose create had that key. None: there is none now."""
        found = [info.sandbox_id async for info in self.list(metadata={CREATE_KEY: key})]
        if len(found) > 1:
            # Forks bear the metadata of their original.
            msg = f"Several sandboxes bear the idempotency key {key!r}: {found}. Connect to the one you mean."
            raise SandboxStateError(msg, op="create")

        with suppress(SandboxNotFoundError):
            return await self.connect(found[0], timeout=timeout) if found else None

        return None

    async def _look_for(self, key: str, timeout: int, *, done: bool) -> Sandbox | None:
        """The sandbox of a create whose answer was lost. None: it has not come to be so far, or nobody can say."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._look):
                for pause in itertools.chain((0.0, 0.1, 0.4, 1.0), () if done else itertools.repeat(3.0)):
                    await asyncio.sleep(pause)
                    try:
                        if made := await self._made_with(key, timeout):
                            return made
                    except (TransportError, APIError) as error:
                        # A broken look is repeated, like the create itself; a refused one would be refused again.
                        if error.retryable is False and not isinstance(error, ConflictError):
                            break

        return None
