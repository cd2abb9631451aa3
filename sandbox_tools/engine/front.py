"""The engine's front door: every request is the control plane's or a sandbox's, and is let in only with its key."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox_tools.engine.access import Keys, Refusal, refusal
from sandbox_tools.engine.api import Engine, control_plane
from sandbox_tools.engine.gateway import NOT_FOUND, forward
from sandbox_tools.engine.routing import SERVICE_PORTS, Address, AddressError, Asked, address_of, names_the_sandbox
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.errors import CapacityError, ConflictError, NotFoundError, SandboxError, status_of

OPEN = ("/health", "/openapi.json")
"""Paths of the control plane that need no key."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A request that may go in, and where."""

    address: Address
    tunnel: Tunnel
    headers: list[tuple[bytes, bytes]]
    """As they go inwards."""


@dataclass(frozen=True, kw_only=True)
class Turned:
    """A request that a sandbox's address answers by itself."""

    status: int
    body: dict[str, object]


class Front:
    """The engine as one ASGI application: the control plane, and every sandbox's own address.

    Args:
        engine: What to serve.
        api_key: Demanded in `X-API-KEY` by every route of the control plane but those in `OPEN`. None: whoever reaches
            the socket may call.
        on_request: Called at the beginning of each request.
    """

    def __init__(self, engine: Engine, *, api_key: str | None, on_request: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._control: ASGIApp = control_plane(engine)
        self._api_key = api_key
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._control(scope, receive, send)
            return

        headers = Headers(scope=scope)
        query = scope["query_string"].decode("latin-1")
        asked = Asked(method=scope["method"], path=scope["path"], query=query, headers=headers)
        way = await self.admit(asked)
        if isinstance(way, Passage):
            await forward(way.tunnel, way.address, way.headers, scope, receive, send)
        elif isinstance(way, Turned):
            await JSONResponse(way.body, way.status)(scope, receive, send)
        elif self._api_key and asked.path not in OPEN and not _same(headers.get("x-api-key", ""), self._api_key):
            error = {"code": 401, "message": "Invalid API key. Send the engine's key in `X-API-KEY`."}
            await JSONResponse(error, 401)(scope, receive, send)
        else:
            await self._control(scope, receive, send)

    async def admit(self, asked: Asked) -> Passage | Turned | None:
        """Where a request goes: into a sandbox, back with an answer, or (None) to the control plane."""
        self._on_request()
        address: Address | None = None
        try:
            address = address_of(asked, self._tokens())
            if address is None:
                return None
            return await self._admit(address, asked)
        except AddressError as error:
            return Turned(status=error.status, body={"code": error.status, "message": str(error)})
        except (NotFoundError, ConflictError):
            # On its way to a pause it is as good as gone: clients ask right after their streams broke.
            return _turned(address, 502, NOT_FOUND)
        except CapacityError as error:
            # The engine isn't ready: clients repeat a request where this slug says that nothing was started.
            body = {"code": 503, "message": error.message, "error_code": "sandbox_capacity_unavailable"}
            return Turned(status=503, body=body)
        except SandboxError as error:
            return _turned(address, status_of(type(error)), error.message)

    async def _admit(self, address: Address, asked: Asked) -> Passage | Turned:
        supervisor = self._engine.supervisor
        # Before it is woken: whoever has no key must not start it either.
        record = supervisor.entry(address.sandbox_id).record
        keys = Keys(token=record.token, secure=record.secure, traffic_token=record.traffic_token)
        refused = refusal(keys, address.port, asked.method, asked.path, asked.headers, asked.arguments, time.time())
        if refused is not None:
            return _refused(address, refused)

        entry = await supervisor.for_traffic(address.sandbox_id)
        if entry.tunnel is None:
            return _turned(address, 502, NOT_FOUND)
        return Passage(address=address, tunnel=entry.tunnel, headers=_inward(asked.headers, address, keys))

    def _tokens(self) -> Iterator[tuple[str, str]]:
        for entry in self._engine.supervisor.entries():
            yield entry.record.id, entry.record.token


def _inward(headers: Headers, address: Address, keys: Keys) -> list[tuple[bytes, bytes]]:
    """The headers as the sandbox gets them: without what was meant for this door, and with the guest's own token."""
    service = address.port in SERVICE_PORTS
    dropped = {b"e2b-traffic-access-token", *((b"x-access-token",) if service else ())}
    if names_the_sandbox(headers.get("authorization", ""), address.sandbox_id):
        dropped.add(b"authorization")
    inward = [(name, value) for name, value in headers.raw if name not in dropped]
    return [*inward, (b"x-access-token", keys.token.encode())] if service else inward


def _refused(address: Address, refused: Refusal) -> Turned:
    body: dict[str, object] = {"code": refused.status, "message": refused.message}
    if refused.status == 403:
        body["sandboxId"] = address.sandbox_id
    return Turned(status=refused.status, body=body)


def _turned(address: Address | None, status: int, message: str) -> Turned:
    sandbox_id = address.sandbox_id if address else ""
    return Turned(status=status, body={"sandboxId": sandbox_id, "message": message, "code": status})


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
