"""Rows that several real processes share: nobody decides twice, nobody overrides a living holder."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys

import pytest

from sandbox_tools.errors import ConfigError
from sandbox_tools.session.bindings import MemoryBindings, SqliteBindings

RACER = """
import asyncio, sys
from sandbox_tools.session.bindings import SqliteBindings

async def main(path, me, rounds):
    bindings = SqliteBindings(path)
    print("ready", flush=True)
    sys.stdin.readline()
    handle = (await bindings.current("ann", "t", 0)).handle
    won = 0
    while won < rounds:
        held = await bindings.begin_transition(handle, holder=me, now=0, until=60, unless="nothing")
        if held is None:
            await asyncio.sleep(0.001)
            continue
        won += 1
        # Only one may be here: what is read must be what the last one wrote.
        count = int(held.sandbox_id or 0)
        assert await bindings.end_transition(held, state="running", sandbox_id=str(count + 1))
        print("fence", held.fence, flush=True)
    await bindings.aclose()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def race(path, processes, rounds):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), f"p{number}", str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert all(racer.returncode == 0 for racer in racers)
    return [int(line.split()[1]) for output in outputs for line in output.splitlines()]


async def test_processes_that_race_hold_one_after_the_other_and_no_fence_twice(tmp_path):
    path = tmp_path / "sessions.db"
    fences = race(path, processes=4, rounds=25)
    assert sorted(fences) == list(range(1, 101))
    bindings = SqliteBindings(path)
    assert (await bindings.current("ann", "t", 0)).sandbox_id == "100"
    await bindings.aclose()


@pytest.fixture
async def bindings():
    made = MemoryBindings()
    yield made
    await made.aclose()


async def hold(bindings, handle, *, now=0.0, holder="me", unless="nothing"):
    return await bindings.begin_transition(handle, holder=holder, now=now, until=now + 60, unless=unless)


async def lease(bindings, handle, *, now=0.0, use="u"):
    return await bindings.begin_lease("ann", "t", handle, use=use, holder="other", now=now, until=now + 60)


async def test_a_lease_and_a_pause_exclude_each_other(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    assert await lease(bindings, handle)
    assert await hold(bindings, handle, unless="leased") is None
    await bindings.end_use("u", 1)
    assert await hold(bindings, handle, unless="leased")
    assert await lease(bindings, handle) is None


async def test_a_turn_stops_a_policy_but_not_an_explicit_pause(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    await bindings.begin_turn("ann", "t", use="turn", holder="other", until=60)
    assert await hold(bindings, handle, unless="used") is None
    assert await hold(bindings, handle, unless="leased")


async def test_a_holder_that_slept_past_its_hold_changes_nothing(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    slow = await hold(bindings, handle)
    quick = await hold(bindings, handle, now=61, holder="other")
    assert quick.fence > slow.fence
    assert not await bindings.end_transition(slow, state="running", sandbox_id="slow")
    assert not await bindings.forget(slow, lost=True)
    await bindings.abandon(slow)
    assert await bindings.end_transition(quick, state="running", sandbox_id="quick")
    assert (await bindings.find("ann", "t")).sandbox_id == "quick"


async def test_renewing_keeps_what_is_held(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    await lease(bindings, handle)
    await bindings.renew("other", now=50, until=110)
    assert await hold(bindings, handle, now=100, unless="leased") is None
    assert await hold(bindings, handle, now=111, unless="leased")


async def test_a_loss_is_told_to_every_thread_that_used_the_sandbox_once(bindings):
    held = await bindings.current("ann", "t", 0)
    await bindings.point("ann", "u", held.handle)
    held = await hold(bindings, held.handle)
    await bindings.forget(held, lost=True)
    assert [await bindings.take_lost("ann", thread) for thread in ("t", "u", "t", "v")] == [
        {"sandbox"},
        {"sandbox"},
        set(),
        set(),
    ]
    assert (await bindings.current("ann", "t", 0)).handle != held.handle


async def test_the_file_is_for_its_user_only(tmp_path):
    path = tmp_path / "deep" / "sessions.db"
    bindings = SqliteBindings(path)
    await bindings.current("ann", "t", 0)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    await bindings.aclose()


async def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    bindings = SqliteBindings(tmp_path / "file" / "sessions.db")
    with pytest.raises(ConfigError, match="SANDBOX_TOOLS_STATE_DIR"):
        await bindings.current("ann", "t", 0)
    await bindings.aclose()


async def test_a_new_file_may_be_opened_by_many_at_once(tmp_path):
    """SQLite does not wait for its lock when the journal mode changes, so we do."""
    for number in range(20):
        many = [SqliteBindings(tmp_path / f"{number}.db") for _ in range(8)]
        found = await asyncio.gather(*(bindings.current("ann", "t", 0) for bindings in many))
        assert len({binding.handle for binding in found}) == 1
        await asyncio.gather(*(bindings.aclose() for bindings in many))
