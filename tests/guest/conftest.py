"""A guest in the tests' own process: real kernels behind a real server on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest_asyncio
import uvicorn

from sandbox_tools.guest import envd, interpreter
from sandbox_tools.guest.accounts import Account
from sandbox_tools.guest.contexts import Contexts
from sandbox_tools.guest.kernels import Launch
from sandbox_tools.guest.main import Server
from sandbox_tools.guest.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp

Events = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Guest:
    """What a test needs of it."""

    http: httpx.AsyncClient
    contexts: Contexts
    settings: Settings
    cwd: Path

    @contextlib.asynccontextmanager
    async def stream(self, code: str, **more: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of an execution as they come; leaving early closes the connection."""
        body = {"code": code, "context_id": None, "language": None, "env_vars": None, **more}
        # Keepalives would hide a server that hangs from the client's own timeout.
        async with asyncio.timeout(60), self.http.stream("POST", "/execute", json=body) as response:
            assert response.status_code == 200
            events = (json.loads(line) async for line in response.aiter_lines())
            yield events

    async def run(self, code: str, **more: Any) -> Events:
        """All events of an execution."""
        async with self.stream(code, **more) as events:
            return [event async for event in events]

    async def value(self, code: str, **more: Any) -> str:
        """The text of the code's last expression."""
        (result,) = of_type(await self.run(code, **more), "result")
        return result["text"]

    async def context(self, **body: Any) -> str:
        """The id of a new context."""
        return (await self.http.post("/contexts", json=body)).json()["id"]


def of_type(events: Events, kind: str) -> Events:
    """The events of one type."""
    return [event for event in events if event["type"] == kind]


def text(events: Events, kind: str = "stdout") -> str:
    """What was written."""
    return "".join(event["text"] for event in of_type(events, kind))


@contextlib.asynccontextmanager
async def served(app: ASGIApp, path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application behind a real server."""
    server = Server(uvicorn.Config(app, uds=str(path), lifespan="auto", log_config=None, timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(30):
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://guest", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        await serving


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: Any) -> AsyncIterator[Guest]:
    """One guest, and one default kernel, for all tests of a module."""
    root: Path = tmp_path_factory.mktemp("guest")
    settings = Settings()
    for name in ("run", "home"):
        (root / name).mkdir()
    launch = Launch(
        account=Account(name=getpass.getuser(), home=root / "home"), directory=root / "run", cwd=root / "home"
    )
    contexts = Contexts(launch, settings)
    async with served(interpreter.create_app(contexts), root / "http.sock") as http:
        guest = Guest(http=http, contexts=contexts, settings=settings, cwd=root / "home")
        yield guest
        # A test that leaves the default context unusable fails here, where it can be seen.
        assert await guest.value("1 + 1") == "2"


@pytest_asyncio.fixture
async def envd_http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A fresh envd."""
    async with served(envd.create_app(Settings()), tmp_path / "http.sock") as http:
        yield http
