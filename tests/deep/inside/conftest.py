"""Inside the environment of deepagents: the engine is another process, started by the tests outside."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox_tools import Client, PauseAfter, Sessions
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.tools import portal

STATE = Path(os.environ["ENGINE_STATE"])


@pytest.fixture(scope="module")
def sessions() -> Iterator[Sessions]:
    """On the portal's loop, so that synchronous and asynchronous tests may share it; it pauses when told to."""
    client = Client(provider="local", state_dir=STATE)
    sessions = Sessions(client, bindings=SqliteBindings(":memory:"), policy=PauseAfter(600))
    sessions.claim(portal.portal_loop())
    yield sessions

    async def end() -> None:
        async for info in client.list():
            await client.kill(info.sandbox_id)
        await sessions.aclose()
        await client.aclose()

    portal.run(sessions, end)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """Another way to the engine, on the test's own loop."""
    async with Client(provider="local", state_dir=STATE) as client:
        yield client
        async for info in client.list():
            await client.kill(info.sandbox_id)
