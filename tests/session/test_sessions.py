"""A conversation keeps one sandbox; it is asleep when nobody uses it, and never while somebody does."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_tools.errors import (
    ConfigError,
    OwnershipError,
    RequestTimeoutError,
    SandboxBusyError,
    SandboxExpiredError,
    ServerError,
)
from sandbox_tools.policy.pause import Never, PauseAfter

from .provider import Machine


def states(provider):
    provider.tick()
    return [machine.state for machine in provider.machines.values()]


async def quiet(sessions):
    """Everything that was begun in the background has ended."""
    async with asyncio.timeout(10):
        while sessions._tasks:
            await asyncio.wait(sessions._tasks)
        await asyncio.sleep(0)


async def use(session, word="x"):
    async with session.lease() as sandbox:
        return list(sandbox.remember(word))


async def test_a_thread_finds_its_sandbox_again_in_another_process(process, provider, clock):
    first, second = process(), process()
    assert await use(first.session("t"), "one") == ["one"]
    await first.aclose()
    assert states(provider) == ["paused"]
    assert await use(second.session("t"), "two") == ["one", "two"]
    assert provider.verbs().count("create") == 1


async def test_two_processes_at_once_create_one_sandbox_for_one_thread(process, provider):
    registries = [process() for _ in range(4)]
    async with asyncio.timeout(20):
        await asyncio.gather(*(use(registry.session("t")) for registry in registries * 3))
    assert provider.verbs().count("create") == 1
    assert len(next(iter(provider.machines.values())).memory) == 12


async def test_the_same_thread_id_of_another_owner_is_another_sandbox(process, provider):
    sessions = process()
    await use(sessions.session("t", owner="ann"))
    assert await use(sessions.session("t", owner="bob"), "b") == ["b"]
    assert len(provider.machines) == 2


async def test_with_pause_after_zero_the_sandbox_sleeps_when_the_turn_returns(process, provider):
    session = process(PauseAfter(0)).session("t")
    async with session.turn():
        await use(session)
        assert states(provider) == ["running"]
    assert states(provider) == ["paused"]


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_a_turn_that_fails_ends_like_any_other(process, provider, error):
    session = process(PauseAfter(0)).session("t")

    async def fail():
        async with session.turn():
            await use(session)
            raise error

    with pytest.raises(error):
        await fail()
    assert states(provider) == ["paused"]


async def test_after_the_turn_the_server_is_told_to_pause_a_little_later_than_we_would(process, provider, clock):
    """A client that is killed after the turn loses nothing: the server's own timer pauses."""
    session = process().session("t")
    async with session.turn():
        await use(session)
    (machine,) = provider.machines.values()
    assert 30 < machine.end - clock.time() <= 60


async def test_an_idle_sandbox_is_paused_after_the_decided_time_and_not_before(process, provider, clock):
    sessions = process()
    session = sessions.session("t")
    async with session.turn():
        await use(session)
    clock.advance(29)
    await sessions.sweep()
    assert states(provider) == ["running"]
    clock.advance(1)
    await sessions.sweep()
    assert states(provider) == ["paused"]
    assert "timeout" not in provider.verbs()


async def test_the_background_sweeper_pauses_by_itself(process, provider, clock):
    session = process().session("t")
    async with session.turn():
        await use(session)
    reached, gate = provider.gate("pause")
    gate.set()
    clock.advance(30)
    async with asyncio.timeout(10):
        await reached.wait()


async def test_a_new_turn_calls_off_the_pause_of_the_last(process, provider, clock):
    sessions = process()
    session = sessions.session("t")
    async with session.turn():
        await use(session)
    clock.advance(20)
    async with session.turn():
        clock.advance(11)
        await sessions.sweep()
        assert "pause" not in provider.verbs()


async def test_nothing_is_paused_while_another_process_holds_a_lease(process, provider, clock):
    mine, other = process(PauseAfter(0)), process()
    session = mine.session("t")
    async with session.turn():
        await use(session)
        async with other.session("t").lease() as sandbox:
            await session.turn_ended()
            async with session.turn():
                pass
            with pytest.raises(SandboxBusyError):
                await session.pause()
            sandbox.remember("still awake")
    assert states(provider) == ["paused"]


async def test_nothing_is_paused_while_a_turn_is_open_in_another_process(process, provider):
    mine, other = process(PauseAfter(0)), process(PauseAfter(0))
    async with other.session("t").turn():
        async with mine.session("t").turn():
            await use(mine.session("t"))
        assert states(provider) == ["running"]
    assert states(provider) == ["paused"]


async def test_overlapping_turns_pause_when_the_last_of_them_ends(process, provider):
    session = process(PauseAfter(0)).session("t")
    await session.turn_started("a")
    await session.turn_started("a")
    await session.turn_started("b")
    await use(session)
    await session.turn_ended("a")
    await session.turn_ended("a")
    assert states(provider) == ["running"]
    await session.turn_ended("b")
    assert states(provider) == ["paused"]


async def test_a_long_call_keeps_its_sandbox_awake_past_the_servers_timeout(process, provider, clock):
    """The timeout on the wire is absolute; the registry renews it while a lease is held."""
    sessions = process()
    async with sessions.session("t").lease() as sandbox:
        for _ in range(60):
            clock.advance(15)
            await sessions.sweep()
        sandbox.remember("after fifteen minutes")


async def test_a_dead_process_holds_a_sandbox_for_a_minute_at_most(process, provider, clock):
    dead, alive = process(), process(PauseAfter(0))
    lease = dead.session("t").lease()
    await lease.__aenter__()
    dead._sweeping.cancel()
    with pytest.raises(SandboxBusyError):
        await alive.session("t").pause()
    clock.advance(61)
    assert await alive.session("t").pause()
    assert states(provider) == ["paused"]
    await lease.__aexit__(None, None, None)


async def test_a_sandbox_that_is_gone_is_replaced_and_the_thread_is_told_once(process, provider, clock):
    session = process().session("t")
    await use(session)
    provider.machines.clear()
    clock.advance(10)
    assert await use(session, "new") == ["new"]
    assert await session.take_lost() == {"sandbox"}
    assert not await session.take_lost()


@pytest.mark.parametrize("error", [ServerError("broken"), RequestTimeoutError("late")])
@pytest.mark.parametrize("verb", ["connect", "info"])
async def test_an_unknown_answer_never_becomes_a_second_sandbox(process, provider, clock, error, verb):
    first, second = process(), process()
    await use(first.session("t"))
    await first.sweep()
    await quiet(first)
    provider.fail(verb, error)
    with pytest.raises(type(error)):
        await use(second.session("t"))
    assert await use(second.session("t"), "y") == ["x", "y"]
    assert provider.verbs().count("create") == 1


async def test_a_create_whose_answer_was_lost_is_found_again(process, provider):
    session = process().session("t")
    provider.fail("create", RequestTimeoutError("late"), after=True)
    with pytest.raises(RequestTimeoutError):
        await use(session)
    assert await use(session) == ["x"]
    assert len(provider.machines) == 1
    assert provider.verbs().count("create") == 1


async def test_a_caller_cancelled_during_create_leaves_one_sandbox_that_the_next_call_uses(process, provider):
    sessions = process(PauseAfter(0))
    reached, gate = provider.gate("create")
    task = asyncio.create_task(use(sessions.session("t")))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    assert await use(sessions.session("t"), "next") == ["next"]
    assert len(provider.machines) == 1
    await sessions.aclose()
    assert states(provider) == ["paused"]


async def test_a_create_whose_caller_was_cancelled_is_finished_and_its_sandbox_put_to_sleep(process, provider):
    """Nothing is left running that nobody will ever ask for again."""
    sessions = process()
    reached, gate = provider.gate("create")
    task = asyncio.create_task(use(sessions.session("t")))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await sessions.aclose()
    assert states(provider) == ["paused"]


async def test_a_process_killed_during_create_leaves_a_sandbox_that_the_next_one_adopts(process, provider, clock):
    dead, alive = process(), process()
    reached, _gate = provider.gate("create")
    task = asyncio.create_task(use(dead.session("t")))
    await reached.wait()
    for mine in [*dead._tasks, dead._sweeping, task]:
        mine.cancel()
    await asyncio.wait([task])
    del provider.gates["create"]
    clock.advance(61)
    assert await use(alive.session("t"), "adopted") == ["adopted"]
    assert provider.verbs().count("create") == 1


async def test_a_call_during_a_pause_waits_for_it_and_wakes_the_same_sandbox(process, provider):
    mine, other = process(PauseAfter(0)), process()
    await use(mine.session("t"), "before")
    reached, gate = provider.gate("pause")
    pausing = asyncio.create_task(mine.session("t").pause())
    await reached.wait()
    calls = [asyncio.create_task(use(registry.session("t"), "after")) for registry in (mine, other)]
    await asyncio.wait(calls, timeout=0.1)
    assert not any(call.done() for call in calls)
    gate.set()
    async with asyncio.timeout(10):
        await pausing
        outcomes = [await call for call in calls]
    assert max(outcomes, key=len) == ["before", "after", "after"]


async def test_a_pause_that_fails_is_tried_again_and_the_turn_keeps_its_outcome(process, provider, clock):
    sessions = process(PauseAfter(0))
    session = sessions.session("t")
    provider.fail("pause", ServerError("disk full"))
    async with session.turn():
        await use(session)
    assert states(provider) == ["running"]
    clock.advance(30)
    await sessions.sweep()
    assert states(provider) == ["paused"]


async def test_a_sandbox_paused_behind_our_back_is_woken(process, provider, clock):
    session = process().session("t")
    await use(session)
    next(iter(provider.machines.values())).state = "paused"
    clock.advance(6)
    assert await use(session, "y") == ["x", "y"]


async def test_a_binding_to_a_sandbox_of_another_owner_is_refused_before_it_is_woken(process, provider, tmp_path):
    first, second = process(PauseAfter(0)), process()
    await use(first.session("t"))
    await first.aclose()
    (machine,) = provider.machines.values()
    machine.metadata["sandbox_tools.owner"] = "somebody else"
    with pytest.raises(OwnershipError):
        await use(second.session("t"))
    assert states(provider) == ["paused"]


async def test_foreign_and_unknown_handles_get_the_same_answer(process):
    sessions = process()
    await use(sessions.session("t", owner="ann"))
    handle = await sessions.session("t", owner="ann").pause()
    stranger = sessions.session("t", owner="bob")
    answers = []
    for word in (handle, "sbx-nosuchword"):
        for verb in (stranger.pause, stranger.resume):
            with pytest.raises(OwnershipError) as caught:
                await verb(word)
            answers.append(str(caught.value).replace(word, "HANDLE"))
    assert len(set(answers)) == 1


async def test_paused_sandboxes_are_listed_for_their_owner_by_handle(process, provider, clock):
    sessions = process()
    for thread, owner in (("t", "ann"), ("u", "ann"), ("t", "bob")):
        await use(sessions.session(thread, owner=owner))
        clock.advance(1)
        await sessions.session(thread, owner=owner).pause()
    clock.advance(10)
    listed = await sessions.session("t", owner="ann").list_paused()
    assert [(paused.thread, paused.current, paused.age) for paused in listed] == [("u", False, 11), ("t", True, 12)]
    assert not any(machine in repr(listed) for machine in provider.machines)


async def test_a_sandbox_of_an_earlier_conversation_becomes_this_threads_own(process, provider):
    sessions = process()
    old, new = sessions.session("old"), sessions.session("new")
    await use(old, "earlier")
    handle = await old.pause()
    await use(new, "now")
    assert await new.resume(handle) == handle
    assert await use(new, "later") == ["earlier", "later"]


async def test_resuming_a_handle_that_is_gone_makes_no_new_sandbox(process, provider):
    sessions = process()
    await use(sessions.session("old"))
    handle = await sessions.session("old").pause()
    provider.machines.clear()
    with pytest.raises(SandboxExpiredError):
        await sessions.session("new").resume(handle)
    assert provider.machines == {}


async def test_a_killed_session_starts_anew_without_talk_of_loss(process, provider):
    session = process().session("t")
    await use(session)
    assert await session.kill()
    assert provider.machines == {}
    assert not await session.kill()
    assert await use(session, "fresh") == ["fresh"]
    assert not await session.take_lost()


async def test_nothing_outside_the_owners_stamp_is_touched_by_a_kill(process, provider, clock):
    session = process().session("t")
    await use(session)
    stranger = Machine("foreign", {"sandbox_tools.owner": "default"}, "running", 0, clock.time() + 900)
    provider.machines["foreign"] = stranger
    await session.kill()
    assert list(provider.machines) == ["foreign"]


async def test_without_a_sandbox_there_is_nothing_to_pause_to_resume_or_to_kill(process, provider):
    session = process().session("t")
    async with session.turn():
        pass
    assert (await session.pause(), await session.resume(), await session.kill()) == (None, None, False)
    assert provider.log == []


async def test_under_never_the_registry_asks_for_no_pause_even_at_its_close(process, provider, clock):
    sessions = process(Never())
    await use(sessions.session("t"))
    clock.advance(100)
    await sessions.aclose()
    assert "pause" not in provider.verbs()


async def test_a_closed_registry_says_so(process):
    sessions = process()
    await sessions.aclose()
    with pytest.raises(ConfigError):
        await use(sessions.session("t"))


async def test_closing_leaves_a_sandbox_in_use_to_the_servers_timer(process, provider):
    sessions = process()
    async with sessions.session("t").lease():
        await sessions.aclose()
        assert states(provider) == ["running"]


async def test_a_registry_is_not_used_from_two_event_loops(process):
    sessions = process()
    await use(sessions.session("t"))

    def elsewhere():
        asyncio.run(use(sessions.session("t")))

    with pytest.raises(ConfigError):
        await asyncio.to_thread(elsewhere)
