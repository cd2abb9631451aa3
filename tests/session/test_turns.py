"""A turn wakes its sandbox ahead of the first tool call, and leaves nothing awake however it ends."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_tools.errors import ServerError, TransportError
from sandbox_tools.policy.pause import PauseAfter

from .test_sessions import quiet, states, use


async def asleep(session):
    await use(session, "before")
    await session.pause()


async def test_a_turn_wakes_a_paused_sandbox_before_any_tool_call(process, provider):
    sessions = process()
    session = sessions.session("t")
    await asleep(session)
    await session.turn_started()
    await quiet(sessions)
    assert states(provider) == ["running"]
    assert await use(session) == ["before", "x"]
    assert provider.verbs().count("connect") == 1


async def test_the_start_of_a_turn_waits_for_no_wake(process, provider):
    sessions = process()
    session = sessions.session("t")
    await asleep(session)
    reached, gate = provider.gate("connect")
    async with asyncio.timeout(10):
        await session.turn_started()
        await reached.wait()
    lease = asyncio.create_task(use(session))
    await asyncio.wait([lease], timeout=0.1)
    assert not lease.done()
    gate.set()
    assert await lease == ["before", "x"]
    assert provider.verbs().count("connect") == 1


async def test_a_turn_on_a_thread_without_a_sandbox_makes_none(process, provider):
    sessions = process()
    async with sessions.session("t").turn():
        await quiet(sessions)
    assert provider.log == []


async def test_without_early_resume_the_first_tool_call_wakes(process, provider):
    sessions = process(early_resume=False)
    session = sessions.session("t")
    await asleep(session)
    async with session.turn():
        await quiet(sessions)
        assert states(provider) == ["paused"]
        await use(session)


async def test_an_early_wake_that_fails_is_the_first_tool_calls_to_report(process, provider):
    sessions = process()
    session = sessions.session("t")
    await asleep(session)
    provider.fail("connect", ServerError("broken"))
    provider.fail("connect", ServerError("still broken"))
    async with session.turn():
        await quiet(sessions)
        with pytest.raises(ServerError, match="still broken"):
            await use(session)
        assert await use(session) == ["before", "x"]


async def test_a_turn_that_ends_before_it_is_awake_leaves_it_asleep(process, provider):
    sessions = process(PauseAfter(0))
    session = sessions.session("t")
    await asleep(session)
    reached, gate = provider.gate("connect")
    await session.turn_started()
    await reached.wait()
    ending = asyncio.create_task(session.turn_ended())
    await asyncio.sleep(0)
    gate.set()
    await ending
    await quiet(sessions)
    await sessions.sweep()
    assert states(provider) == ["paused"]


async def test_a_message_during_a_pause_waits_for_it_and_wakes_the_same_sandbox(process, provider):
    mine, other = process(), process()
    session = mine.session("t")
    await use(session, "before")
    reached, gate = provider.gate("pause")
    pausing = asyncio.create_task(session.pause())
    await reached.wait()
    await other.session("t").turn_started()
    await session.turn_started()
    gate.set()
    await pausing
    await quiet(mine)
    await quiet(other)
    assert states(provider) == ["running"]
    assert await use(other.session("t")) == ["before", "x"]
    assert len(provider.machines) == 1


async def test_a_turn_keeps_its_sandbox_past_the_servers_timeout(process, provider, clock):
    """The model may think for long between two calls: the timer is renewed for a turn as for a lease."""
    sessions = process()
    session = sessions.session("t")
    async with session.turn():
        await use(session)
        for _ in range(60):
            clock.advance(15)
            await sessions.sweep()
        assert states(provider) == ["running"]
        assert "timeout" not in provider.verbs()


async def test_a_turn_that_never_ends_is_forgotten_and_said_so(process, provider, clock, caplog):
    sessions = process(turn_limit=600)
    session = sessions.session("t")
    await session.turn_started()
    await use(session)
    for _ in range(50):
        clock.advance(15)
        await sessions.sweep()
    assert states(provider) == ["paused"]
    assert "open for 600 s without a tool call" in caplog.text
    await session.turn_ended()
    assert await use(session) == ["x", "x"]


async def test_a_turn_with_tool_calls_is_not_forgotten(process, provider, clock):
    sessions = process(turn_limit=600)
    session = sessions.session("t")
    await session.turn_started()
    for _ in range(10):
        await use(session)
        for _ in range(20):
            clock.advance(15)
            await sessions.sweep()
    assert states(provider) == ["running"]


async def test_parallel_leases_of_nested_turns_end_with_the_last_of_them(process, provider):
    sessions = process(PauseAfter(0))
    session = sessions.session("t")
    inside, out = asyncio.Event(), asyncio.Event()

    async def sub_agent(number):
        async with session.turn(), session.lease() as sandbox:
            sandbox.remember(f"agent {number}")
            inside.set()
            await out.wait()

    async with session.turn():
        agents = [asyncio.create_task(sub_agent(number)) for number in range(3)]
        await inside.wait()
        assert states(provider) == ["running"]
        out.set()
        await asyncio.gather(*agents)
        assert states(provider) == ["running"]
    await quiet(sessions)
    assert states(provider) == ["paused"]
    assert provider.verbs().count("create") == 1


async def test_an_owner_whose_turns_use_no_sandbox_is_not_woken_for_until_one_does(process, provider):
    sessions = process()
    session = sessions.session("t")
    await asleep(session)
    for _ in range(20):
        async with session.turn():
            await quiet(sessions)
        await session.pause()
    woken = provider.verbs().count("connect")
    async with session.turn():
        await quiet(sessions)
        assert provider.verbs().count("connect") == woken
        await session.wake()  # its model has begun to call a tool
        await quiet(sessions)
        assert states(provider) == ["running"]
        await use(session)
    await session.pause()
    async with session.turn():
        await quiet(sessions)
        assert states(provider) == ["running"]


async def test_a_use_whose_end_could_not_be_written_ends_with_the_next_beat(process, provider, clock):
    """Otherwise it would be renewed for as long as the process lives, and its sandbox never paused."""
    sessions = process(PauseAfter(0))
    session = sessions.session("t")
    end_use = sessions.bindings.end_use

    async def broken(use, now):
        raise TransportError("no database", op="bindings", retryable=True)

    async with session.turn():
        await use(session)
        sessions.bindings.end_use = broken
    assert states(provider) == ["running"]
    sessions.bindings.end_use = end_use
    clock.advance(15)
    await sessions.sweep()
    await quiet(sessions)
    assert states(provider) == ["paused"]


async def test_a_turn_that_could_not_be_written_is_written_with_its_first_lease(process, provider):
    sessions, other = process(), process(PauseAfter(0))
    session = sessions.session("t")
    begin_turn = sessions.bindings.begin_turn

    async def broken(*_, **__):
        raise TransportError("no database", op="bindings", retryable=True)

    sessions.bindings.begin_turn = broken
    with pytest.raises(TransportError):
        await session.turn_started()
    sessions.bindings.begin_turn = begin_turn
    await use(session)
    async with other.session("t").turn():
        pass
    assert states(provider) == ["running"]
    await session.turn_ended()
