"""What the client is tested against: a server that does as it is told, an edge, a loopback, and the real engine."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn

from sandbox_tools.client import Client, Sandbox
from tests.client.edge import Edge
from tests.client.loopback import Loopback, reaching
from tests.client.server import Server
from tests.machine import Box, EngineProcess


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="st", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def server(state: Path) -> Iterator[Server]:
    """A real HTTP server on the state directory's socket, in a thread."""
    protocol = Server()
    config = uvicorn.Config(protocol.app, uds=str(state / "engine.sock"), log_level="critical", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()))
    thread.start()
    deadline = time.monotonic() + 10
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)

    try:
        yield protocol
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)


@pytest.fixture
async def client(server: Server, state: Path) -> AsyncIterator[Client]:
    async with Client(provider="local", state_dir=state) as client:
        yield client


@pytest.fixture
async def edge(state: Path) -> AsyncIterator[Edge]:
    edge = Edge()
    async with edge.serve(state / "engine.sock"):
        yield edge


@pytest.fixture
async def at_edge(edge: Edge, state: Path) -> AsyncIterator[Sandbox]:
    async with Client(provider="local", state_dir=state) as client:
        yield await client.create()


@pytest.fixture
async def both(state: Path) -> AsyncIterator[tuple[Loopback, Sandbox]]:
    """A loopback server, and the sandbox on it."""
    async with reaching(state) as (loopback, sandbox):
        yield loopback, sandbox


@pytest.fixture
async def on_engine(engine: EngineProcess) -> AsyncIterator[Client]:
    """A client of the real engine."""
    async with Client(provider="local", state_dir=engine.state) as client:
        yield client


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    """A real sandbox for a module's tests, each of which leaves it as it was."""
    box = engine.create()
    yield box
    box.kill()
