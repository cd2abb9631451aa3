"""The control plane's routes: parse, call, render; no logic."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import unquote_plus

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sandbox_tools.engine.records import page
from sandbox_tools.engine.supervisor import Supervisor
from sandbox_tools.errors import CapacityError, ConfigError, SandboxError, status_of
from sandbox_tools.models import ConnectRequest, CreateRequest, ErrorBody, SandboxInfo, State, TimeoutRequest, Wire

_MAX_PAGE = 100

Body = TypeVar("Body", bound=BaseModel)


class Engine:
    """What the routes work on; until it is prepared, they say what is being prepared."""

    def __init__(self) -> None:
        self.preparing = "starting"
        self._supervisor: Supervisor | None = None

    @property
    def supervisor(self) -> Supervisor:
        """The sandboxes.

        Raises:
            CapacityError: The engine isn't ready yet; the message says what it is doing.
        """
        if self._supervisor is None:
            msg = f"The engine is not ready yet: {self.preparing}. Try again in a moment."
            raise CapacityError(msg)
        return self._supervisor

    @supervisor.setter
    def supervisor(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor


def control_plane(engine: Engine) -> Starlette:
    """The control plane's routes; who may call them is decided before."""
    routes = Starlette(
        routes=[
            Route("/health", _health),
            Route("/sandboxes", _create, methods=["POST"]),
            Route("/v2/sandboxes", _create, methods=["POST"]),
            Route("/sandboxes", _list_running, methods=["GET"]),
            Route("/v2/sandboxes", _list, methods=["GET"]),
            Route("/sandboxes/{id}", _info, methods=["GET"]),
            Route("/sandboxes/{id}", _kill, methods=["DELETE"]),
            Route("/sandboxes/{id}/pause", _pause, methods=["POST"]),
            Route("/sandboxes/{id}/resume", _resume, methods=["POST"]),
            Route("/sandboxes/{id}/connect", _connect, methods=["POST"]),
            Route("/v2/sandboxes/{id}/connect", _connect, methods=["POST"]),
            Route("/sandboxes/{id}/timeout", _set_timeout, methods=["POST"]),
        ],
        exception_handlers={SandboxError: _failed, HTTPException: _no_route, Exception: _broken},
    )
    routes.state.engine = engine
    return routes


async def _health(request: Request) -> Response:
    _supervisor(request)
    return PlainTextResponse("OK")


async def _create(request: Request) -> Response:
    entry = await _supervisor(request).create(await _parse(request, CreateRequest))
    return _json(entry.record.grant(), 201)


async def _connect(request: Request) -> Response:
    body = await _parse(request, ConnectRequest)
    entry, resumed = await _supervisor(request).connect(_id(request), body.timeout)
    return _json(entry.record.grant(), 201 if resumed else 200)


async def _resume(request: Request) -> Response:
    body = await _parse(request, ConnectRequest)
    entry = await _supervisor(request).resume(_id(request), body.timeout)
    return _json(entry.record.grant(), 201)


async def _pause(request: Request) -> Response:
    await _supervisor(request).pause(_id(request))
    return Response(status_code=204)


async def _kill(request: Request) -> Response:
    await _supervisor(request).kill(_id(request))
    return Response(status_code=204)


async def _set_timeout(request: Request) -> Response:
    body = await _parse(request, TimeoutRequest)
    await _supervisor(request).set_timeout(_id(request), body.timeout)
    return Response(status_code=204)


async def _info(request: Request) -> Response:
    return _json(_supervisor(request).info(_id(request)))


async def _list_running(request: Request) -> Response:
    return _page(request, states=frozenset({"running"}), limit=None)


async def _list(request: Request) -> Response:
    states = request.query_params.get("state", "running,paused").split(",")
    known: tuple[State, ...] = ("running", "paused")
    if unknown := set(states) - set(known):
        msg = f"Unknown state {sorted(unknown)!r}. Ask for `running`, `paused` or both."
        raise ConfigError(msg, op="list")

    limit = request.query_params.get("limit", str(_MAX_PAGE))
    if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_PAGE:
        msg = f"validation error: `limit` is {limit!r}. Ask for 1 to {_MAX_PAGE}."
        raise ConfigError(msg, op="list")

    return _page(request, states=frozenset(states), limit=int(limit))


def _page(request: Request, *, states: frozenset[str], limit: int | None) -> Response:
    infos: list[SandboxInfo] = _supervisor(request).infos()
    rows, token = page(
        infos,
        states=states,
        metadata=parse_metadata(request.query_params.get("metadata", "")),
        limit=limit or len(infos),
        token=request.query_params.get("nextToken"),
    )
    headers = {"X-Next-Token": token} if token else {}
    return JSONResponse([_plain(row) for row in rows], headers=headers)


def parse_metadata(query: str) -> dict[str, str]:
    """A metadata filter as E2B's SDKs send it: encoded once as a whole, and once more each key and value.

    Raises:
        ConfigError: It is not made of pairs.
    """
    pairs = [pair.split("=") for pair in unquote_plus(query).split("&") if pair]
    if any(len(pair) != 2 for pair in pairs):
        msg = "Error parsing metadata: send URL-encoded `key=value` pairs joined by `&`."
        raise ConfigError(msg, op="list")

    return {unquote_plus(key): unquote_plus(value) for key, value in pairs}


def _supervisor(request: Request) -> Supervisor:
    engine: Engine = request.app.state.engine
    return engine.supervisor


def _id(request: Request) -> str:
    # Some SDKs append the client's id after a dash.
    sandbox_id: str = request.path_params["id"].partition("-")[0]
    return sandbox_id


async def _parse(request: Request, model: type[Body]) -> Body:
    try:
        return model.model_validate_json(await request.body() or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        msg = f"validation error: {where}: {first['msg']}"
        raise ConfigError(msg) from error


def _plain(model: Wire) -> object:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _json(model: Wire, status: int = 200) -> Response:
    return JSONResponse(_plain(model), status)


def _error(status: int, message: str, error_code: str | None = None) -> Response:
    return _json(ErrorBody(code=status, message=message, error_code=error_code), status)


def _error_code(error: SandboxError) -> str | None:
    # Clients repeat a create only where this slug says that nothing was started.
    return "sandbox_capacity_unavailable" if isinstance(error, CapacityError) else None


async def _failed(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SandboxError)
    return _error(status_of(type(error)), error.message, _error_code(error))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


async def _broken(_request: Request, error: Exception) -> Response:
    return _error(500, f"The engine failed: {type(error).__name__}. Its log says more.")
