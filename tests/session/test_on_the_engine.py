"""Sessions over the real engine: what is frozen, held, sensitive or verified there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from sandbox_tools.client import Client
from sandbox_tools.policy.pause import Never, PauseAfter
from sandbox_tools.session import holds
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.session.sessions import Sessions

from .test_state import FreezeFirst


@pytest.fixture
async def app(engine, tmp_path) -> AsyncIterator[Callable[..., Sessions]]:
    """Makes registries, each as in a process of its own; what they made is gone at the end."""
    made: list[tuple[Sessions, Client, SqliteBindings]] = []

    def make(policy=None) -> Sessions:
        client = Client(provider="local", state_dir=engine.state)
        bindings = SqliteBindings(tmp_path / "sessions.db")
        sessions = Sessions(client, bindings=bindings, policy=policy or Never())
        made.append((sessions, client, bindings))
        return sessions

    yield make
    for sessions, client, bindings in made:
        await sessions.aclose()
        for row in await bindings.of_owner("default"):
            if row.sandbox_id:
                await client.kill(row.sandbox_id)
        await bindings.aclose()
        await client.aclose()


async def run(session, code):
    async with session.lease() as sandbox:
        done = await sandbox.run_code(code)
    assert done.failure is None, done.failure
    return done.text


async def info_of(sessions, thread="t"):
    row = await sessions.bindings.find("default", thread)
    return await sessions.client.info(row.sandbox_id)


async def until(sessions, state):
    async with asyncio.timeout(60):
        while (await info_of(sessions)).state != state:
            await asyncio.sleep(0.1)


async def test_between_turns_it_is_frozen_and_the_next_call_finds_everything(app):
    sessions = app(FreezeFirst(600))
    session = sessions.session("t")
    async with session.turn():
        await run(session, "x = 41")
    assert (await info_of(sessions)).frozen_since is not None
    async with session.turn():
        assert await run(session, "x + 1") == "42"
        assert (await info_of(sessions)).frozen_since is None


async def test_a_frozen_sandbox_is_paused_in_its_time_and_wakes_whole(app):
    sessions = app(FreezeFirst(1))
    session = sessions.session("t")
    async with session.turn():
        await run(session, "x = 41")
    await until(sessions, "paused")
    assert await run(session, "x + 1") == "42"
    assert await session.take_lost() == frozenset()


async def test_a_command_left_running_keeps_it_awake_until_it_has_ended(app, monkeypatch):
    monkeypatch.setattr(holds, "POLL", 0.5)
    sessions = app(PauseAfter(0))
    session = sessions.session("t")
    async with session.turn(), session.lease() as sandbox:
        command = await sandbox.commands.start("sleep 4; touch done", timeout=None)
        await command.disconnect()
    await asyncio.sleep(2)
    assert (await info_of(sessions)).state == "running"
    await until(sessions, "paused")
    assert await run(session, "import os; os.path.exists('done')") == "True"


async def test_a_sensitive_sandbox_keeps_its_files_and_no_memory(app):
    sessions = app(PauseAfter(0))
    session = sessions.session("t", sensitive=True)
    async with session.turn():
        await run(session, "secret = 41; open('kept', 'w').write('yes')")
    assert (await info_of(sessions)).state == "paused"
    assert await run(session, "open('kept').read(), 'secret' in globals()") == "('yes', False)"
    assert await session.take_lost() == {"memory"}


async def test_the_servers_timer_too_keeps_no_memory_of_a_sensitive_one(app):
    sessions = app()
    session = sessions.session("t", sensitive=True)
    await run(session, "secret = 41; open('kept', 'w').write('yes')")
    await sessions.client.set_timeout((await info_of(sessions)).sandbox_id, 0)
    await until(sessions, "paused")
    sessions.transitions.awake.clear()
    assert await run(session, "open('kept').read(), 'secret' in globals()") == "('yes', False)"


async def test_a_turn_in_another_process_wakes_it_before_the_first_call(app):
    first, second = app(PauseAfter(0)), app(PauseAfter(0))
    async with first.session("t").turn():
        await run(first.session("t"), "x = 41")
    async with second.session("t").turn():
        await until(second, "running")
        assert await run(second.session("t"), "x + 1") == "42"
