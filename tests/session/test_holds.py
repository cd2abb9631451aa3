"""What outlives a turn on purpose keeps its sandbox awake: an explicit hold, a port, a command in the background."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_tools.errors import ConfigError, ServerError
from sandbox_tools.policy.pause import PauseAfter

from .test_sessions import quiet, states, use


async def pass_time(sessions, clock, seconds, step=5):
    await quiet(sessions)
    for _ in range(0, seconds, step):
        clock.advance(step)
        await sessions.sweep()
        await quiet(sessions)


async def start(session):
    async with session.lease() as sandbox:
        return (await sandbox.commands.start("make")).pid


def only(provider):
    (machine,) = provider.machines.values()
    return machine


@pytest.mark.parametrize("how", ["hold", "expose"])
async def test_a_held_sandbox_is_paused_when_the_hold_is_over(process, provider, clock, how):
    sessions = process(PauseAfter(10))
    session = sessions.session("t")
    await use(session)
    await (session.hold(600) if how == "hold" else session.expose(8000, 600))
    await pass_time(sessions, clock, 595)
    assert states(provider) == ["running"]
    assert "timeout" not in provider.verbs()
    await pass_time(sessions, clock, 20)
    assert states(provider) == ["paused"]


async def test_a_hold_outlives_its_process_by_the_servers_timer(process, provider, clock):
    sessions = process(PauseAfter(10))
    session = sessions.session("t")
    await use(session)
    await session.hold(1000)
    sessions._sweeping.cancel()
    clock.advance(999)
    assert states(provider) == ["running"]
    clock.advance(30)
    assert states(provider) == ["paused"]


async def test_leases_may_end_while_others_start_commands(process, clock):
    sessions = process(PauseAfter(10))
    session = sessions.session("t")
    await use(session)
    pids = await asyncio.gather(*(start(session) for _ in range(8)))
    held = await sessions.bindings.find("default", "t")
    holds = await sessions.bindings.holds(held.handle, clock.time())
    assert {hold.pid for hold in holds} == set(pids)


async def test_a_hold_of_nothing_ends_it(process, provider, clock):
    sessions = process(PauseAfter(10))
    session = sessions.session("t")
    await use(session)
    await session.hold(600)
    await session.hold(0)
    await pass_time(sessions, clock, 10)
    assert states(provider) == ["paused"]


async def test_a_hold_without_a_sandbox_or_without_sense_is_refused(process):
    session = process().session("t")
    with pytest.raises(ConfigError):
        await session.hold(60)
    with pytest.raises(ConfigError):
        await session.hold(-1)


async def test_an_explicit_pause_wins_over_a_hold(process, provider):
    session = process().session("t")
    await use(session)
    await session.hold(600)
    await session.pause()
    assert states(provider) == ["paused"]


async def test_a_command_in_the_background_keeps_its_sandbox_awake_until_it_has_ended(process, provider, clock):
    sessions = process(PauseAfter(10))
    pid = await start(sessions.session("t"))
    await pass_time(sessions, clock, 900)
    assert states(provider) == ["running"]
    only(provider).commands.discard(pid)
    await pass_time(sessions, clock, 45)
    assert states(provider) == ["paused"]
    assert "timeout" not in provider.verbs()


async def test_the_command_of_a_dead_process_counts_for_the_living(process, provider, clock):
    dead, alive = process(PauseAfter(10)), process(PauseAfter(10))
    pid = await start(dead.session("t"))
    dead._sweeping.cancel()
    alive.on_own_loop()
    await pass_time(alive, clock, 900)
    assert states(provider) == ["running"]
    only(provider).commands.discard(pid)
    await pass_time(alive, clock, 45)
    assert states(provider) == ["paused"]


async def test_a_command_that_cannot_be_asked_after_is_not_paused(process, provider, clock):
    sessions = process(PauseAfter(10))
    session = sessions.session("t")
    await start(session)
    provider.unreachable = ServerError("broken")
    await pass_time(sessions, clock, 90)
    assert "pause" not in provider.verbs()
    provider.unreachable = None


async def test_a_command_that_has_ended_within_its_lease_holds_nothing(process, provider, clock):
    sessions = process(PauseAfter(10))
    async with sessions.session("t").lease() as sandbox:
        pid = (await sandbox.commands.start("true")).pid
        only(provider).commands.discard(pid)
    await pass_time(sessions, clock, 15)
    assert states(provider) == ["paused"]


async def test_a_closing_registry_leaves_what_is_held_awake(process, provider, clock):
    sessions = process(PauseAfter(0))
    await start(sessions.session("t"))
    await sessions.aclose()
    assert states(provider) == ["running"]
