"""The client: the verbs of the control plane, in whichever dialect the provider speaks."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from sandbox_tools.client.dialects import Dialect, choose
from sandbox_tools.client.local import LocalEngine
from sandbox_tools.client.sandbox import Sandbox
from sandbox_tools.client.transport import LONG_REQUEST, Call, Transport
from sandbox_tools.errors import ConfigError, ConflictError, NotFoundError, ProtocolError, SandboxStateError
from sandbox_tools.models import (
    DEFAULT_TEMPLATE,
    DEFAULT_TIMEOUT,
    ConnectRequest,
    CreateRequest,
    SandboxGrant,
    SandboxInfo,
    State,
    TimeoutRequest,
)
from sandbox_tools.paths import state_directory

M = TypeVar("M", bound=BaseModel)

_ROWS = TypeAdapter(list[dict[str, Any]])


class Client:
    """Creates sandboxes and finds them again; an async context manager that owns its connections.

    No I/O happens before the first call. The local provider's engine is started by the first call that does not
    find it, which takes minutes once, while it builds its template.

    Args:
        provider: `"e2b"`, `"ppio"`, `"ucloud"`, `"local"`, or a `Dialect`. None: the one whose key the environment
            holds, else `"local"`.
        api_key: None: from the environment (`E2B_API_KEY` and the like).
        api_url: None: from the environment, else the provider's own, else the local engine's Unix socket.
        request_timeout: Seconds for one call to the control plane with all its repeats. Create, connect and pause,
            which may move gigabytes, have at least 600 s.
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
        if request_timeout <= 0:
            msg = f"`request_timeout` is {request_timeout!r}. Pass a positive number of seconds."
            raise ConfigError(msg)

        self.dialect, self.address = choose(provider, api_key=api_key, api_url=api_url)
        engine = None
        if self.dialect.default_domain is None and not self.address.url_named and transport is None:
            engine = LocalEngine(state_dir or state_directory(), on_wait=on_wait)

        self.verify_state = verify_state
        self._long = max(request_timeout, LONG_REQUEST)
        self.transport = Transport(self.address, request_timeout=request_timeout, engine=engine, inner=transport)

    async def __aenter__(self) -> Self:
        return self

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
        metadata: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Sandbox:
        """Starts a new sandbox.

        If this is cancelled or its answer is lost, a sandbox may exist that only its timeout ends: `list` by a
        metadata value of your own finds it.

        Args:
            template: None: the provider's code interpreter.
            timeout: Seconds from now until the server pauses or kills it; renew with `set_timeout`.
            auto_pause: Pause at the timeout. False: kill.
            env: Set for all code and commands.

        Raises:
            CapacityError, RateLimitError: There is no room now; nothing was started.
        """
        body = _body(
            CreateRequest,
            "create",
            template_id=template or DEFAULT_TEMPLATE,
            timeout=_seconds("create", timeout),
            auto_pause=auto_pause,
            metadata=dict(metadata or {}),
            env_vars=dict(env or {}),
        )
        call = Call(
            op="create",
            method="POST",
            path=self.dialect.create_path,
            body=self.dialect.create_body(body),
            idempotent=False,
            deadline=self._long,
        )
        return Sandbox(self, _parsed(SandboxGrant, await self.transport.send(call), "create"))

    async def connect(self, sandbox_id: str, *, timeout: int = DEFAULT_TIMEOUT) -> Sandbox:
        """Finds a sandbox, and wakes it when it is paused.

        Args:
            timeout: Seconds from now until its end; never shortens that of a running one.

        Raises:
            NotFoundError: It is gone.
        """
        grant, woken = await self.grant(sandbox_id, timeout=timeout)
        sandbox = Sandbox(self, grant)
        if woken:
            await sandbox.until_ready()

        return sandbox

    async def grant(self, sandbox_id: str, *, timeout: int) -> tuple[SandboxGrant, bool]:
        """What `connect` and `Sandbox.resume` share: the right to use the sandbox, and whether this woke it."""
        body = _body(ConnectRequest, "connect", timeout=_seconds("connect", timeout))
        call = Call(
            op="connect",
            method="POST",
            path=self.dialect.connect_path.format(id=_quoted("connect", sandbox_id)),
            sandbox_id=sandbox_id,
            body={**body.model_dump(by_alias=True), **self.dialect.connect_with},
            deadline=self._long,
        )
        response = await self.transport.send(call)
        return _parsed(SandboxGrant, response, "connect", sandbox_id), response.status_code == 201

    async def pause(self, sandbox_id: str, *, memory: bool = True) -> bool:
        """Puts memory and files on disk and frees the RAM; running streams are cut.

        Returns:
            True: paused by this call. False: it was paused already (or by an attempt whose answer was lost).

        Raises:
            NotFoundError: It is gone.
            ConflictError: It is in a transition that forbids a pause.
        """
        path = f"/sandboxes/{_quoted('pause', sandbox_id)}/pause"
        call = Call(
            op="pause",
            method="POST",
            path=path,
            sandbox_id=sandbox_id,
            body=self.dialect.pause_body if memory else {**(self.dialect.pause_body or {}), "memory": False},
            deadline=self._long,
        )
        try:
            await self.transport.send(call)
        except ConflictError:
            if (await self.info(sandbox_id)).state != "paused":
                raise

            return False

        return True

    async def kill(self, sandbox_id: str) -> bool:
        """Ends a sandbox, running or paused, with all that is in it.

        Returns:
            True: killed. False: there was none (or an attempt whose answer was lost had killed it).
        """
        path = f"/sandboxes/{_quoted('kill', sandbox_id)}"
        try:
            await self.transport.send(Call(op="kill", method="DELETE", path=path, sandbox_id=sandbox_id))
        except NotFoundError:
            return False

        return True

    async def info(self, sandbox_id: str, *, deadline: float | None = None) -> SandboxInfo:
        """Looks at a sandbox without waking it.

        Args:
            deadline: Seconds. None: `request_timeout`.

        Raises:
            NotFoundError: It is gone.
        """
        path = f"/sandboxes/{_quoted('info', sandbox_id)}"
        call = Call(op="info", method="GET", path=path, sandbox_id=sandbox_id, deadline=deadline)
        return self._own(_parsed(SandboxInfo, await self.transport.send(call), "info", sandbox_id))

    async def list(
        self, *, state: State | None = None, metadata: Mapping[str, str] | None = None
    ) -> AsyncIterator[SandboxInfo]:
        """All sandboxes of this key, newest first, fetched page by page.

        Args:
            state: None: running and paused ones.
            metadata: Only those that have all these pairs. None: all.
        """
        params = {"limit": "100"}
        if state:
            params["state"] = state

        if metadata:
            # The wire's own double encoding; httpx adds the third that a query needs (E2B's SDKs do the same).
            quote = urllib.parse.quote
            params["metadata"] = urllib.parse.urlencode({quote(k): quote(v) for k, v in metadata.items()})

        seen: set[str] = set()
        while True:
            response = await self.transport.send(Call(op="list", method="GET", path="/v2/sandboxes", params=params))
            rows = [self._own(row) for row in _parsed_rows(response)]
            fresh = [row for row in rows if row.sandbox_id not in seen]
            seen.update(row.sandbox_id for row in fresh)
            for row in fresh:
                # Asked for already, but a server that ignores a filter must not widen what the caller acts on.
                if (state is None or row.state == state) and (metadata or {}).items() <= row.metadata.items():
                    yield row

            token = response.headers.get("x-next-token")
            if not token:
                return

            if not fresh:
                msg = "`list` was given a next page that brings nothing new. Check what answers at the API URL."
                raise ProtocolError(msg, op="list")

            params["nextToken"] = token

    async def set_timeout(self, sandbox_id: str, timeout: int) -> None:
        """Moves the end of a running sandbox, later or earlier.

        Args:
            timeout: Seconds from now. 0: it ends at once (paused or killed, as `create` was told).

        Raises:
            NotFoundError: It is gone.
            SandboxStateError: It is paused, and so has no end to move.
        """
        path = f"/sandboxes/{_quoted('set_timeout', sandbox_id)}/timeout"
        body = _body(TimeoutRequest, "set_timeout", timeout=timeout)
        call = Call(op="set_timeout", method="POST", path=path, sandbox_id=sandbox_id, body=body.model_dump())
        try:
            await self.transport.send(call)
        except NotFoundError as error:
            # The wire says 404 for a paused one too, and a caller who believed that would start anew.
            if (await self.info(sandbox_id)).state != "paused":
                raise

            msg = f"`set_timeout` needs a running sandbox, and {sandbox_id!r} is paused. Connect to it first."
            raise SandboxStateError(msg, op="set_timeout", sandbox_id=sandbox_id) from error

    def _own(self, info: SandboxInfo) -> SandboxInfo:
        own_id = self.dialect.sandbox_id(info.sandbox_id, info.client_id)
        return info if own_id == info.sandbox_id else info.model_copy(update={"sandbox_id": own_id})


def _seconds(op: str, timeout: int) -> int:
    if timeout <= 0:
        msg = f"`timeout` of `{op}` is {timeout!r}. Pass a positive number of seconds."
        raise ConfigError(msg, op=op)

    return timeout


def _quoted(op: str, sandbox_id: str) -> str:
    if not sandbox_id or sandbox_id in (".", ".."):
        msg = f"`{op}` needs a sandbox id, not {sandbox_id!r}. Pass the `id` of a `Sandbox`."
        raise ConfigError(msg, op=op)

    return urllib.parse.quote(sandbox_id, safe="")


def _body(model: type[M], op: str, **fields: object) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"`{op}` was given a wrong `{'.'.join(map(str, first['loc']))}`: {first['msg']}. Correct it."
        raise ConfigError(msg, op=op) from None


def _parsed(model: type[M], response: httpx.Response, op: str, sandbox_id: str | None = None) -> M:
    try:
        return model.model_validate(_present(TypeAdapter(dict[str, Any]).validate_json(response.content)))
    except ValidationError:
        raise _shapeless(response, op, sandbox_id) from None


def _parsed_rows(response: httpx.Response) -> list[SandboxInfo]:
    try:
        return [SandboxInfo.model_validate(_present(row)) for row in _ROWS.validate_json(response.content)]
    except ValidationError:
        raise _shapeless(response, "list", None) from None


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    # On this wire a null means the same as an absent field.
    return {name: value for name, value in fields.items() if value is not None}


def _shapeless(response: httpx.Response, op: str, sandbox_id: str | None) -> ProtocolError:
    # Neither the body nor pydantic's error is shown: they may hold an access token.
    kind = response.headers.get("content-type", "no content type")
    msg = (
        f"`{op}` was answered with status {response.status_code} and {len(response.content)} bytes of {kind!r} that "
        "are not of the protocol. Check the API URL."
    )
    return ProtocolError(msg, op=op, sandbox_id=sandbox_id)
