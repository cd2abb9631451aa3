"""What a pause keeps is what the resume gives back; what it does not give back is told, once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sandbox_tools.client.dialects import LOCAL, PPIO
from sandbox_tools.errors import OwnershipError
from sandbox_tools.policy.pause import PauseAfter, Plan

from .provider import Machine
from .test_sessions import quiet, states, use


def only(provider):
    (machine,) = provider.machines.values()
    return machine


class FreezeFirst(PauseAfter):
    """Freezes at once and pauses later."""

    def plan(self, idle, pool, own):
        return Plan(freeze_after=0, pause_after=self.seconds, reason="test", expected_cost=None)


async def test_memory_that_did_not_come_back_is_told_once_and_the_sandbox_can_be_used(process, provider):
    session = process().session("t")
    await use(session)
    await session.pause()
    only(provider).marks["memory"] = 0
    assert await use(session, "y") == ["x", "y"]
    assert await session.take_lost() == {"memory"}
    assert await session.take_lost() == frozenset()
    await session.pause()
    await use(session)
    assert await session.take_lost() == frozenset()


async def test_a_loss_is_seen_by_another_process_too(process, provider):
    first, second = process(PauseAfter(0)), process()
    await use(first.session("t"))
    await first.aclose()
    only(provider).marks.clear()
    await use(second.session("t"))
    assert await second.session("t").take_lost() == {"memory", "files"}


async def test_what_the_servers_timer_paused_is_held_to_its_mark(process, provider, clock):
    """The mark is planted when the sandbox becomes idle, for whoever pauses it."""
    sessions = process()
    session = sessions.session("t")
    async with session.turn():
        await use(session)
    sessions._sweeping.cancel()
    clock.advance(100)
    assert states(provider) == ["paused"]
    only(provider).marks.clear()
    await use(session)
    assert await session.take_lost() == {"memory", "files"}


async def test_what_has_come_back_is_not_spoken_of(process, provider):
    session = process().session("t")
    for _ in range(3):
        await use(session)
        await session.pause()
    await use(session)
    assert await session.take_lost() == frozenset()


async def test_a_sensitive_sandbox_keeps_files_only_and_says_so(process, provider):
    session = process().session("t", sensitive=True)
    await use(session, "secret")
    machine = only(provider)
    assert machine.kept == "files"
    await session.pause()
    assert machine.memory == []
    assert await use(session, "y") == ["y"]
    assert await session.take_lost() == {"memory"}
    assert len(provider.machines) == 1


async def test_a_sensitive_sandbox_is_treated_so_by_every_process(process, provider, clock):
    first, second = process(PauseAfter(30)), process(PauseAfter(30))
    await use(first.session("t", sensitive=True), "secret")
    first._sweeping.cancel()
    second.on_own_loop()
    for _ in range(40):
        clock.advance(5)
        await second.sweep()
    assert states(provider) == ["paused"]
    assert only(provider).memory == []


async def test_where_files_alone_cannot_be_kept_a_sensitive_sandbox_ends(process, provider):
    provider.dialect = PPIO
    session = process(PauseAfter(0)).session("t", sensitive=True)
    async with session.turn():
        await use(session, "secret")
        assert only(provider).kept == "nothing"
    assert provider.machines == {}
    assert await session.take_lost() == {"sandbox"}


async def test_an_idle_sandbox_is_frozen_first_and_thawed_by_its_next_use(process, provider, clock):
    sessions = process(FreezeFirst(30))
    session = sessions.session("t")
    async with session.turn():
        await use(session)
    assert only(provider).frozen
    assert await use(session) == ["x", "x"]
    assert not only(provider).frozen
    await sessions.sweep()
    await quiet(sessions)
    assert only(provider).frozen
    clock.advance(30)
    await sessions.sweep()
    assert states(provider) == ["paused"]
    assert provider.verbs().count("freeze") == 2


async def test_a_provider_that_cannot_freeze_is_not_asked_to(process, provider):
    provider.dialect = replace(LOCAL, can_freeze=False)
    session = process(FreezeFirst(30)).session("t")
    async with session.turn():
        await use(session)
    assert "freeze" not in provider.verbs()


async def test_a_sandbox_with_an_open_stream_is_not_frozen_but_paused_in_its_time(process, provider, clock):
    sessions = process(FreezeFirst(30))
    session = sessions.session("t")
    async with session.turn():
        await use(session)
        only(provider).busy = True
    assert not only(provider).frozen
    clock.advance(30)
    await sessions.sweep()
    assert states(provider) == ["paused"]


async def test_a_thread_has_several_sandboxes_and_one_of_them_is_current(process, provider):
    sessions = process()
    session = sessions.session("t")
    await use(session, "first")
    first = await session.pause()
    second = await session.new()
    assert second != first
    assert await use(session, "second") == ["second"]
    await session.pause()
    assert {paused.handle: paused.current for paused in await session.list_paused()} == {first: False, second: True}
    assert await session.resume(first) == first
    assert await use(session) == ["first", "x"]
    assert len(provider.machines) == 2


async def test_the_sandbox_that_a_new_one_replaces_falls_asleep_in_the_same_turn(process, provider, clock):
    sessions = process(PauseAfter(30))
    session = sessions.session("t")
    async with session.turn():
        await use(session, "first")
        await session.new()
        await use(session, "second")
        clock.advance(30)
        await sessions.sweep()
        await sessions.sweep()
        assert states(provider) == ["paused", "running"]


async def test_a_new_sandbox_that_was_never_used_is_not_made_twice(process, provider):
    session = process().session("t")
    handle = await session.new()
    assert await session.new() == handle
    await use(session)
    assert len(provider.machines) == 1


@pytest.fixture
async def forgetful(process, provider, tmp_path):
    """A registry whose bindings have been lost, after ann's thread `t` was used."""
    before = process()
    await use(before.session("t", owner="ann"), "before")
    handle = await before.session("t", owner="ann").pause()
    await before.aclose()
    for file in tmp_path.glob("sessions.db*"):
        file.unlink()
    return process(), handle


async def test_a_lost_binding_is_found_again_by_the_stamp(forgetful, provider):
    sessions, _ = forgetful
    assert await use(sessions.session("t", owner="ann"), "after") == ["before", "after"]
    assert provider.verbs().count("create") == 1


async def test_a_lost_binding_is_found_by_its_handle_from_another_thread(forgetful):
    sessions, handle = forgetful
    session = sessions.session("u", owner="ann")
    assert await session.resume(handle) == handle
    assert await use(session, "after") == ["before", "after"]


async def test_a_lost_binding_is_listed(forgetful):
    sessions, handle = forgetful
    assert [paused.handle for paused in await sessions.session("u", owner="ann").list_paused()] == [handle]


async def test_a_lost_binding_is_never_found_by_another_owner(forgetful, provider):
    sessions, handle = forgetful
    stranger = sessions.session("t", owner="bob")
    with pytest.raises(OwnershipError):
        await stranger.resume(handle)
    assert await stranger.list_paused() == []
    assert await use(stranger, "own") == ["own"]
    assert len(provider.machines) == 2


async def test_what_bears_half_a_stamp_is_left_alone(process, provider, clock):
    provider.machines["odd"] = Machine("odd", {"sandbox_tools.owner": "default"}, "paused", 0, clock.time())
    session = process().session("t")
    assert await session.list_paused() == []
    await use(session)
    assert provider.machines["odd"].state == "paused"


async def test_what_a_create_made_whose_process_died_is_found_and_paused_by_another(process, provider, clock):
    dead, alive = process(), process(PauseAfter(10))
    reached, _gate = provider.gate("create")
    task = asyncio.create_task(use(dead.session("t")))
    await reached.wait()
    for mine in [*dead._tasks, dead._sweeping, task]:
        mine.cancel()
    await asyncio.wait([task])
    del provider.gates["create"]
    alive.on_own_loop()
    for _ in range(20):
        clock.advance(5)
        await alive.sweep()
        await quiet(alive)
    assert states(provider) == ["paused"]
    assert "timeout" not in provider.verbs()
    assert await use(alive.session("t")) == ["x"]
    assert len(provider.machines) == 1


async def test_what_a_process_woke_and_died_before_it_could_say_so_is_paused_by_another(process, provider, clock):
    dead, alive = process(), process(PauseAfter(10))
    session = dead.session("t")
    await use(session)
    await session.pause()
    reached, _gate = provider.gate("connect")
    task = asyncio.create_task(use(session))
    await reached.wait()
    for mine in [*dead._tasks, dead._sweeping, task]:
        mine.cancel()
    await asyncio.wait([task])
    del provider.gates["connect"]
    assert states(provider) == ["running"]
    alive.on_own_loop()
    for _ in range(20):
        clock.advance(5)
        await alive.sweep()
        await quiet(alive)
    assert states(provider) == ["paused"]
    assert "timeout" not in provider.verbs()
