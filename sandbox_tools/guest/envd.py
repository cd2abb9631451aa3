"""The sandbox's own daemon (port 49983): its health, what the engine tells it, and who may call the rest of it."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandbox_tools.guest import files, filesystem, metrics, process
from sandbox_tools.guest.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sandbox_tools.guest.settings import Settings

UNAUTHORIZED = "unauthorized access, please provide a valid access token or method signing if supported"

OPEN = ("GET", "/health")
"""Needs no token. Signatures of file URLs are checked by the engine, which then sends the token."""

INIT = ("POST", "/init")
"""May bring another token, as the memory of a sandbox can become that of its copy: so the engine needs none for it."""


def create_app(settings: Settings, processes: Processes | None = None, internal: Sequence[Route] = ()) -> ASGIApp:
    """The application. Every answer that is an error is JSON with `code` and `message`.

    Args:
        processes: The sandbox's, for who has to end them. None: nobody has to.
        internal: Routes that are the engine's own; it lets nobody else through to them.
    """
    app = Starlette(
        routes=[
            Route("/health", _health),
            Route("/init", _init, methods=["POST"]),
            Route("/envs", _envs),
            *files.routes(),
            *filesystem.routes(),
            *metrics.routes(),
            *process.routes(settings, processes or Processes()),
            *internal,
        ],
        exception_handlers={HTTPException: _error},
    )
    app.state.settings = settings
    return TokenCheck(app, settings)


class TokenCheck:
    """Turns away whoever lacks the sandbox's access token, once there is one."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the call on, or answers 401."""
        token = self.settings.access_token
        if token and scope["type"] == "http" and not _is_open(scope):
            given = dict(scope["headers"]).get(b"x-access-token", b"")
            if not secrets.compare_digest(given, token.encode()):
                await JSONResponse({"code": 401, "message": UNAUTHORIZED}, 401)(scope, receive, send)
                return

        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    called = (scope["method"], scope["path"])
    # Only what came through the tunnel has no address: everybody else is code that runs in here.
    return called == OPEN or (called == INIT and scope["client"] is None)


async def _health(_: Request) -> Response:
    return Response(status_code=204)


async def _init(request: Request) -> Response:
    # `timestamp` is for machines with a clock of their own; the clock in here is the host's.
    try:
        body = json.loads(await request.body() or b"{}")
        env_vars, token, lifecycle_id = (body.get(name) for name in ("envVars", "accessToken", "lifecycleID"))
        let_out = body.get("letOut")
    except (ValueError, AttributeError) as error:
        raise HTTPException(400, "The body is not a JSON object. Send one.") from error
    if not isinstance(env_vars or {}, dict) or not all(isinstance(value, str) for value in (env_vars or {}).values()):
        raise HTTPException(400, "`envVars` is not an object of strings. Send one, or leave it out.")
    if let_out is not None and not isinstance(let_out, bool):
        raise HTTPException(400, "`letOut` is neither true nor false. Send one, or leave it out.")
    for name, value in (("accessToken", token), ("lifecycleID", lifecycle_id)):
        if value is not None and not isinstance(value, str):
            raise HTTPException(400, f"`{name}` is not a string. Send one, or leave it out.")

    settings: Settings = request.app.state.settings
    settings.init(env_vars=env_vars, access_token=token, lifecycle_id=lifecycle_id, let_out=let_out)
    return Response(status_code=204)


async def _envs(request: Request) -> Response:
    return JSONResponse(dict(request.app.state.settings.env_vars))


async def _error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error

    return JSONResponse({"code": error.status_code, "message": error.detail}, error.status_code, error.headers)
