"""Rows that several real processes share: nobody decides twice, nobody overrides a living holder."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys

import pytest

from sandbox_tools.errors import ConfigError, TransportError
from sandbox_tools.policy.adaptive import AdaptivePause
from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.pause import Period
from sandbox_tools.policy.savings import Account, Change
from sandbox_tools.policy.tally import Tally
from sandbox_tools.session.bindings import PostgresBindings, SqliteBindings
from sandbox_tools.session.schema import STEPS
from tests.session.stores import STORES, bindings_at, place_of

RACER = """
import asyncio, sys
from tests.session.stores import bindings_at

async def main(place, me, rounds):
    bindings = bindings_at(place)
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


def race(place, processes, rounds):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, place, f"p{number}", str(rounds)],
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


@pytest.mark.parametrize("store", ["file", "postgres"])
async def test_processes_that_race_hold_one_after_the_other_and_no_fence_twice(store, request, tmp_path):
    place = place_of(store, request, tmp_path)
    fences = race(place, processes=4, rounds=25)
    assert sorted(fences) == list(range(1, 101))
    bindings = bindings_at(place)
    assert (await bindings.current("ann", "t", 0)).sandbox_id == "100"
    await bindings.aclose()


@pytest.fixture(params=STORES)
async def bindings(request, tmp_path):
    made = bindings_at(place_of(request.param, request, tmp_path))
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
    await bindings.begin_turn("ann", "t", use="turn", holder="other", now=0, until=60)
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
    await bindings.renew("other", transitions=(), now=50, until=110)
    assert await hold(bindings, handle, now=100, unless="leased") is None
    assert await hold(bindings, handle, now=111, unless="leased")


async def test_renewing_keeps_the_transitions_that_go_on_and_no_others(bindings):
    going_on, unwritten = [(await bindings.current("ann", thread, 0)).handle for thread in ("t", "u")]
    assert await hold(bindings, going_on)
    assert await hold(bindings, unwritten)  # its process has ended it, and could not say so here
    await bindings.renew("me", transitions={going_on}, now=50, until=110)
    assert await hold(bindings, going_on, now=61, holder="other") is None
    assert await hold(bindings, unwritten, now=61, holder="other")


async def test_a_loss_is_told_to_every_thread_that_used_the_sandbox_once(bindings):
    held = await bindings.current("ann", "t", 0)
    await bindings.point("ann", "u", held.handle)
    held = await hold(bindings, held.handle)
    await bindings.forget(held, lost=True)
    told = [await bindings.take_lost("ann", thread) for thread in ("t", "u", "t", "v")]
    assert told == [{"sandbox"}, {"sandbox"}, set(), set()]
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


async def test_a_hold_stops_a_policy_until_its_time_and_no_explicit_pause(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    await bindings.hold("ann", "t", handle, use="h", pid=7, until=100)
    [held] = await bindings.holds(handle, 50)
    assert (held.id, held.pid, held.until) == ("h", 7, 100)
    assert await hold(bindings, handle, now=50, unless="used") is None
    assert await bindings.holds(handle, 101) == []
    held = await hold(bindings, handle, now=50, unless="leased")
    await bindings.end_transition(held, state="paused", sandbox_id="s")
    await bindings.hold("ann", "t", handle, use="h", pid=None, until=200)
    assert [each.until for each in await bindings.holds(handle, 150)] == [200]
    assert await bindings.end_use("h", 150) == handle
    assert await hold(bindings, handle, now=150, unless="used")


async def test_what_a_dead_process_left_awake_is_found_and_what_is_used_is_not(bindings):
    handles = {}
    for name, due_at in (("due", 10.0), ("later", 100.0), ("unasked", None)):
        handle = handles[name] = (await bindings.current("ann", name, 0)).handle
        held = await hold(bindings, handle)
        await bindings.end_transition(held, state="running", sandbox_id=name, due_at=due_at)
    assert await bindings.list_idle(20, 20) == [handles["unasked"], handles["due"]]
    await bindings.begin_lease("ann", "due", handles["due"], use="u", holder="x", now=20, until=30)
    await bindings.begin_turn("ann", "unasked", use="t", holder="x", now=20, until=30)
    assert await bindings.list_idle(25, 25) == []
    # The lease was renewed by nobody: its process is dead. Its idle time counts from the last known use.
    assert set(await bindings.list_idle(31, 31)) == {handles["due"], handles["unasked"]}


async def test_a_sandbox_that_is_found_again_is_bound_once_and_to_a_thread_that_has_none(bindings):
    fresh = await bindings.current("ann", "t", 0)
    more = {"state": "paused", "sensitive": True, "now": 5.0}
    assert await bindings.adopt("ann", "t", "sbx-old", sandbox_id="s1", **more)
    assert not await bindings.adopt("ann", "t", "sbx-old", sandbox_id="s1", **more)
    assert not await bindings.adopt("bob", "t", "sbx-other", sandbox_id="s1", **more)
    assert await bindings.by_handle("ann", fresh.handle) is None
    own = await bindings.find("ann", "t")
    assert (own.handle, own.sandbox_id, own.state, own.sensitive) == ("sbx-old", "s1", "paused", True)
    assert await bindings.adopt("ann", "t", "sbx-older", sandbox_id="s0", **more)
    assert (await bindings.find("ann", "t")).handle == "sbx-old"


async def test_many_that_adopt_at_once_bind_it_once(bindings):
    for number in range(20):
        more = {"sandbox_id": f"s{number}", "state": "paused", "sensitive": False, "now": 5.0}
        thread, handle = f"t{number}", f"sbx-{number}"
        done = await asyncio.gather(*(bindings.adopt("ann", thread, handle, **more) for _ in range(8)))
        assert sorted(done) == [False] * 7 + [True]
        assert (await bindings.find("ann", thread)).handle == handle
    assert len(await bindings.of_owner("ann")) == 20


async def test_many_that_adopt_and_ask_for_a_new_one_at_once_have_one_current(bindings):
    for number in range(20):
        more = {"sandbox_id": f"s{number}", "state": "paused", "sensitive": False, "now": 5.0}
        thread, handle = f"t{number}", f"sbx-{number}"
        adopting = [bindings.adopt("ann", thread, handle, **more) for _ in range(4)]
        asking = [bindings.current("ann", thread, 5.0) for _ in range(4)]
        await asyncio.gather(*(each for pair in zip(asking, adopting, strict=True) for each in pair))
        assert (await bindings.find("ann", thread)).handle == handle


async def test_what_is_found_again_replaces_nothing_that_is_being_made(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    held = await hold(bindings, handle)
    more = {"sandbox_id": "s1", "state": "paused", "sensitive": False, "now": 5.0}
    assert await bindings.adopt("ann", "t", "sbx-old", **more)
    assert await bindings.end_transition(held, state="running", sandbox_id="s2")
    assert (await bindings.find("ann", "t")).sandbox_id == "s2"


async def test_who_held_a_handle_before_it_was_lost_and_found_changes_nothing(bindings):
    handle = (await bindings.current("ann", "t", 0)).handle
    slow = await hold(bindings, handle)
    quick = await hold(bindings, handle, now=61, holder="other")
    assert await bindings.forget(quick, lost=True)
    more = {"sandbox_id": "s1", "state": "paused", "sensitive": False, "now": 62.0}
    assert await bindings.adopt("ann", "t", handle, **more)
    for _ in range(2):
        held = await hold(bindings, handle, now=62)
        assert held.fence not in (slow.fence, quick.fence)
        assert not await bindings.end_transition(slow, state="running", sandbox_id="slow")
        assert await bindings.end_transition(held, state="paused", sandbox_id="s1")


async def test_an_idle_period_ends_with_its_next_use_and_teaches_once(bindings):
    terms, policy = Terms.of(vcpu=2, gib=1), AdaptivePause()
    for thread in ("tool", "none", "away"):
        handle = (await bindings.current("ann", thread, 0)).handle
        await bindings.begin_idle(handle, owner="ann", began=10, terms=terms.key, threshold=3.0)
    tool = (await bindings.find("ann", "tool")).handle
    await bindings.begin_turn("ann", "tool", use="a", holder="x", now=15, until=60)
    await bindings.begin_lease("ann", "tool", tool, use="b", holder="x", now=21, until=60)
    await bindings.begin_lease("ann", "tool", tool, use="c", holder="x", now=30, until=60)
    await bindings.begin_turn("ann", "none", use="d", holder="x", now=15, until=60)
    seen = []

    def learn(ended):
        seen.append((ended.ended, ended.lead, ended.threshold, ended.priced))
        return policy.learn(Period(gap=5.0), terms)

    # What is over has its price at once and once; what it teaches comes at the horizon.
    for expected in (1, 0):
        price = {"now": 16.0, "learn": lambda ended: Tally(played=1.0, broken_even=2.0)}
        assert await bindings.price(terms.key, **price) == expected
    pool, own = await bindings.tallies("ann", terms.key)
    assert (pool.played, pool.broken_even, pool.count, own.played) == (1.0, 2.0, 0, 0)
    assert await bindings.absorb(terms.key, began_before=9, learn=learn) == 0
    counts = await asyncio.gather(*(bindings.absorb(terms.key, began_before=10, learn=learn) for _ in range(4)))
    assert sum(counts) == 3
    assert {(15, 6, 3, True), (15, None, 3, False), (None, None, 3, False)} <= set(seen)
    pool, own = await bindings.tallies("ann", terms.key)
    assert (pool.count, own.count) == (3, 3)
    assert list(pool.costs) == pytest.approx(list(policy.learn(Period(gap=5.0), terms).costs[i] * 3 for i in range(91)))
    assert (await bindings.tallies("bob", terms.key))[1].count == 0


async def test_tallies_of_many_who_learn_at_once_add_up(bindings):
    terms, policy = Terms.of(vcpu=2, gib=1), AdaptivePause()
    for number in range(40):
        await bindings.begin_idle(f"h{number}", owner=f"o{number % 2}", began=number, terms=terms.key, threshold=None)
    await asyncio.gather(
        *(
            bindings.absorb(terms.key, began_before=limit, learn=lambda ended: policy.learn(Period(gap=1.0), terms))
            for limit in range(0, 40, 3)
        ),
        bindings.absorb(terms.key, began_before=40, learn=lambda ended: policy.learn(Period(gap=1.0), terms)),
    )
    pool, own = await bindings.tallies("o1", terms.key)
    assert (pool.count, own.count) == (40, 20)


async def test_accounts_go_on_from_change_to_change_and_outlive_their_sandbox(bindings):
    def change(at, state, idle_since=0.0):
        return Change(at=at, state=state, idle_since=idle_since, running=2.0, frozen=1.0, waited=0.5)

    for owner in ("ann", "bob"):
        for each in (change(0, "running"), change(10, "paused", 8), change(500, "running"), change(510, "killed")):
            await bindings.record(f"h-{owner}", owner, "t", each)
    [(handle, owner, thread, account)] = await bindings.accounts("ann")
    assert (handle, owner, thread) == ("h-ann", "ann", "t")
    assert (account.running, account.paused, account.pauses, account.resumes) == (20, 490, 1, 1)
    assert (account.spent, account.always_on, account.waited) == (40, 1020, 2.0)
    assert account.timer == 2.0 * (10 + 298 + 10)
    assert len(await bindings.accounts()) == 2
    assert isinstance(account, Account)


OLD = """
CREATE TABLE sandboxes (handle TEXT PRIMARY KEY, owner TEXT NOT NULL, thread TEXT NOT NULL, sandbox_id TEXT,
    state TEXT NOT NULL DEFAULT 'new', awake_until REAL NOT NULL DEFAULT 0, idle_since REAL NOT NULL,
    fence INTEGER NOT NULL DEFAULT 0, holder TEXT, held_until REAL NOT NULL DEFAULT 0);
CREATE INDEX sandboxes_of_an_owner ON sandboxes (owner);
CREATE TABLE threads (owner TEXT NOT NULL, thread TEXT NOT NULL, handle TEXT, lost INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (owner, thread));
CREATE TABLE uses (id TEXT PRIMARY KEY, holder TEXT NOT NULL, owner TEXT NOT NULL, thread TEXT NOT NULL, handle TEXT,
    until REAL NOT NULL);
INSERT INTO sandboxes (handle, owner, thread, sandbox_id, state, idle_since, fence)
    VALUES ('sbx-1', 'ann', 't', 's1', 'paused', 50, 7);
INSERT INTO threads VALUES ('ann', 't', 'sbx-1', 0), ('ann', 'gone', NULL, 1);
INSERT INTO uses VALUES ('u', 'x', 'ann', 't', 'sbx-1', 100), ('turn', 'x', 'ann', 't', NULL, 100);
"""


async def test_a_file_of_the_first_version_is_upgraded_with_all_that_is_in_it(tmp_path):
    path = tmp_path / "sessions.db"
    with sqlite3.connect(path) as db:
        db.executescript(OLD)
    # By several at once, as after an upgrade of an app with many workers.
    many = [SqliteBindings(path) for _ in range(4)]
    found = await asyncio.gather(*(bindings.find("ann", "t") for bindings in many))
    assert {(each.handle, each.sandbox_id, each.state, each.fence, each.created_at) for each in found} == {
        ("sbx-1", "s1", "paused", 7, 50)
    }
    first = many[0]
    assert await first.take_lost("ann", "gone") == {"sandbox"}
    assert await hold(first, "sbx-1", now=60, unless="leased") is None
    assert await first.end_use("turn", 60) == "sbx-1"
    await asyncio.gather(*(bindings.aclose() for bindings in many))


async def test_a_store_of_a_later_version_is_refused_and_left_alone(request, tmp_path):
    place = place_of("file", request, tmp_path)
    bindings = bindings_at(place)
    await bindings.current("ann", "t", 0)
    await bindings.aclose()
    with sqlite3.connect(place) as db:
        db.execute("UPDATE bindings_schema SET version = ?", (len(STEPS) + 1,))
    bindings = bindings_at(place)
    with pytest.raises(ConfigError, match="later version"):
        await bindings.current("ann", "u", 0)
    await bindings.aclose()
    with sqlite3.connect(place) as db:
        assert db.execute("SELECT count(*) FROM sandboxes").fetchone() == (1,)


async def test_a_database_that_is_not_there_is_a_typed_error_that_may_be_tried_again(tmp_path):
    pytest.importorskip("psycopg")
    bindings = PostgresBindings(f"host={tmp_path} user=nobody dbname=none")
    with pytest.raises(TransportError, match="Postgres") as caught:
        await bindings.find("ann", "t")
    assert caught.value.retryable
    await bindings.aclose()


async def test_a_connection_that_the_server_ended_is_made_anew(postgres, request, tmp_path):
    import psycopg

    place = place_of("postgres", request, tmp_path)
    bindings = PostgresBindings(place, connections=1)
    handle = (await bindings.current("ann", "t", 0)).handle
    with psycopg.connect(place, autocommit=True) as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert (await bindings.find("ann", "t")).handle == handle
    await bindings.aclose()


async def test_many_threads_share_few_connections(postgres, request, tmp_path):
    import psycopg

    place = place_of("postgres", request, tmp_path)
    bindings = PostgresBindings(place, connections=3)
    found = await asyncio.gather(*(bindings.current("ann", f"t{number % 20}", 0) for number in range(200)))
    assert len({each.handle for each in found}) == 20
    with psycopg.connect(place) as db:
        count = db.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()").fetchone()
    assert count[0] <= 4
    await bindings.aclose()
