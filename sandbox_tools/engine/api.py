"""The control plane's door: a request is parsed as its operation says, and what comes of it is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sandbox_tools.engine import controls, reports, unsupported
from sandbox_tools.engine.openapi import document
from sandbox_tools.engine.operations import IDEMPOTENCY_KEY, SANDBOX_ID, Answer, Call, Engine, Operation, error_body
from sandbox_tools.errors import ConfigError, SandboxError
from sandbox_tools.models import ErrorBody

__all__ = ["Engine", "control_plane"]

_LONGEST_BODY = 1 << 20  # bytes


def control_plane(engine: Engine) -> Starlette:
    """The control plane's routes; who may call them is decided before."""

    async def describe(_: Call) -> Answer:
        return Answer(content=document(operations))

    own = Operation(
        name="describe",
        method="GET",
        path="/openapi.json",
        summary="This description",
        handler=describe,
        answers={200: dict},
        open=True,
    )
    operations = (*controls.OPERATIONS, *reports.OPERATIONS, *unsupported.OPERATIONS, own)
    # A fixed path comes before one that has a parameter in its place.
    paths = sorted({operation.path: None for operation in operations}, key=lambda path: "{" in path)
    routes = Starlette(
        routes=[_route(engine, path, [each for each in operations if each.path == path]) for path in paths],
        exception_handlers={SandboxError: _failed, HTTPException: _no_route, Exception: _broken},
    )
    # A redirect is no answer that the clients know.
    routes.router.redirect_slashes = False
    routes.state.engine = engine
    return routes


def _route(engine: Engine, path: str, operations: Sequence[Operation]) -> Route:
    by_method = {operation.method: operation for operation in operations}

    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        operation = next(each for each in operations if each.method == method)
        with engine.figures.timed(operation.name.removesuffix("V2")):
            return _render(await operation.handler(await _call(request, operation)))

    return Route(path, endpoint, methods=list(by_method))


async def _call(request: Request, operation: Operation) -> Call:
    sandbox_id = request.path_params.get("sandboxID")
    if sandbox_id is not None and not re.fullmatch(SANDBOX_ID, sandbox_id):
        msg = "Invalid sandbox ID"
        raise ConfigError(msg, op=operation.name)

    key = request.headers.get("idempotency-key")
    if operation.keyed and key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        msg = "validation error: `Idempotency-Key` must be 1 to 255 lower-case letters, digits and hyphens"
        raise ConfigError(msg, op=operation.name)

    try:
        return Call(
            engine=request.app.state.engine,
            path=request.path_params,
            headers=request.headers,
            body=None if operation.body is None else await _body(request, operation.body),
            # As text: numbers are read from it, and nothing else is taken for one.
            query=None
            if operation.query is None
            else operation.query.model_validate_strings(dict(request.query_params)),
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        msg = f"validation error: {where}: {first['msg']}"
        raise ConfigError(msg, op=operation.name) from error


async def _body(request: Request, model: type[BaseModel]) -> BaseModel:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY:
            msg = f"validation error: body: longer than {_LONGEST_BODY} bytes"
            raise ConfigError(msg)
    return model.model_validate_json(body or b"{}", strict=True)


def _render(answer: Answer) -> Response:
    headers = dict(answer.headers)
    if answer.content is None:
        return Response(status_code=answer.status, headers=headers)
    if isinstance(answer.content, str):
        return PlainTextResponse(answer.content, answer.status, headers)
    return JSONResponse(_plain(answer.content), answer.status, headers)


def _plain(content: Any) -> Any:
    if isinstance(content, BaseModel):
        return content.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [_plain(each) for each in content] if isinstance(content, list) else content


def _error(status: int, message: str, error_code: str | None = None, headers: Any = None) -> Response:
    body = ErrorBody(code=status, message=message, error_code=error_code)
    return JSONResponse(_plain(body), status, headers)


async def _failed(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SandboxError)
    body = error_body(error)
    return JSONResponse(_plain(body), body.code)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)


async def _broken(_request: Request, error: Exception) -> Response:
    return _error(500, f"The engine failed: {type(error).__name__}. Its log says more.")
