"""The code interpreter's HTTP door (port 49999): executions as streams of lines, and the contexts they run in."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from sandbox_tools.guest.contexts import Context, Contexts, Outlet
from sandbox_tools.guest.events import ENDED, KEEPALIVE, line
from sandbox_tools.guest.kernels import KernelDiedError
from sandbox_tools.guest.languages import PYTHON, UnknownLanguageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Send

T = TypeVar("T")

KEEPALIVE_INTERVAL = 5.0
"""Seconds of silence after which a `keepalive` is sent."""


def create_app(contexts: Contexts) -> Starlette:
    """The application; its lifespan starts the default context and ends all of them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            await contexts.default()
            yield
        finally:
            await contexts.aclose()

    routes = [
        Route("/health", _health),
        Route("/execute", _execute, methods=["POST"]),
        Route("/contexts", _list, methods=["GET"]),
        Route("/contexts", _create, methods=["POST"]),
        Route("/contexts/{id}", _delete, methods=["DELETE"]),
        Route("/contexts/{id}/restart", _restart, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.contexts = contexts
    return app


class LineStream(StreamingResponse):
    """A stream that is closed in step with its connection: a generator left to the collector would run on."""

    body_iterator: AsyncGenerator[bytes, None]

    async def stream_response(self, send: Send) -> None:
        """Sends until the lines end or the caller leaves."""
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def _health(_: Request) -> Response:
    return JSONResponse("OK")


async def _execute(request: Request) -> Response:
    body = await _body(request)
    code, context_id, language = (_text(body, name) for name in ("code", "context_id", "language"))
    if code is None:
        raise HTTPException(400, "`code` is missing. Send the code to run as a string.")
    if context_id and language:
        raise HTTPException(400, "`context_id` and `language` exclude each other. Send one of them.")

    env = _env(body)
    if context_id:
        context = _find(request, context_id)
    else:
        context = await _made(_contexts(request).default(language or PYTHON))
    return LineStream(_lines(context, code, env), media_type="application/json")


async def _lines(context: Context, code: str, env: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """The lines of one execution. Closing this early interrupts the code."""
    out = Outlet(maxsize=8)
    job = context.start(code, env, out)
    ended = False
    try:
        while not ended:
            try:
                async with asyncio.timeout(KEEPALIVE_INTERVAL):
                    events = [await out.get()]
            except TimeoutError:
                yield line(KEEPALIVE)
            else:
                # What is there already leaves with it: each piece takes its own way to the caller.
                while not out.empty():
                    events.append(out.get_nowait())
                yield b"".join(map(line, events))
                for _ in events:
                    out.task_done()
                ended = events[-1] is ENDED
    finally:
        if not ended:
            job.cancel()


async def _list(request: Request) -> Response:
    return JSONResponse([context.describe() for context in _contexts(request)])


async def _create(request: Request) -> Response:
    body = await _body(request)
    language, cwd = _text(body, "language"), _text(body, "cwd")
    made = _contexts(request).create(language or PYTHON, Path(cwd) if cwd else None, _env(body))
    context = await _made(made)
    return JSONResponse(context.describe())


async def _delete(request: Request) -> Response:
    if not await _contexts(request).delete(request.path_params["id"]):
        raise _unknown(request.path_params["id"])

    return JSONResponse(None)


async def _restart(request: Request) -> Response:
    await _made(_find(request, request.path_params["id"]).restart())
    return JSONResponse(None)


def _contexts(request: Request) -> Contexts:
    contexts: Contexts = request.app.state.contexts
    return contexts


def _find(request: Request, context_id: str) -> Context:
    context = _contexts(request).get(context_id)
    if context is None:
        raise _unknown(context_id)

    return context


def _unknown(context_id: str) -> HTTPException:
    return HTTPException(404, f"Context {context_id} not found")


async def _made(opening: Awaitable[T]) -> T:
    try:
        return await opening
    except UnknownLanguageError as error:
        raise HTTPException(400, str(error)) from error
    except (KernelDiedError, OSError) as error:
        msg = f"The kernel could not be started: {error}. Check `cwd`, and that memory and disk space are free."
        raise HTTPException(500, msg) from error


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise HTTPException(400, f"The body is not JSON ({error}). Send a JSON object.") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "The body is not a JSON object. Send one.")

    return body


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise HTTPException(400, f"`{name}` is {value!r}. Send a string or null.")

    return value


def _env(body: Mapping[str, Any]) -> dict[str, str]:
    env = body.get("env_vars") or {}
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise HTTPException(400, "`env_vars` is not an object of strings. Send one, or null.")

    return env
