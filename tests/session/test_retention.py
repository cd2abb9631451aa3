"""What sleeps for long is told of before it is deleted, kept from that, or ended by a rule; only what is ours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox_tools.client.dialects import LOCAL
from sandbox_tools.session.retention import Retention

from .provider import Machine
from .test_sessions import states, use

DAY = 86_400.0


@pytest.fixture
def month(provider):
    """A provider that keeps what is paused for 30 days."""
    provider.dialect = replace(LOCAL, retention=int(30 * DAY), retention_from="pause")


async def sleep(sessions, owner="ann"):
    session = sessions.session("t", owner=owner)
    await use(session)
    return session, await session.pause()


async def days(sessions, clock, count):
    for _ in range(count):
        clock.advance(DAY)
        await sessions.sweep()


@pytest.mark.usefixtures("month")
async def test_a_listing_says_when_the_provider_deletes_and_whether_that_is_near(process, clock):
    sessions = process()
    session, _ = await sleep(sessions)
    (paused,) = await session.list_paused()
    assert (paused.expires_at.timestamp(), paused.expiring) == (clock.time() + 30 * DAY, False)
    clock.advance(27 * DAY)
    (paused,) = await session.list_paused()
    assert paused.expiring


@pytest.mark.parametrize("since", ["creation", "pause"])
async def test_the_time_counts_from_what_the_provider_counts_from(process, provider, clock, since):
    provider.dialect = replace(LOCAL, retention=int(30 * DAY), retention_from=since)
    sessions = process()
    born = clock.time()
    session, _ = await sleep(sessions)
    clock.advance(10 * DAY)
    await use(session)
    await session.pause()
    (paused,) = await session.list_paused()
    assert paused.expires_at.timestamp() == (born if since == "creation" else clock.time()) + 30 * DAY


@pytest.mark.usefixtures("month")
async def test_what_the_provider_itself_says_comes_before_its_documents(process, provider, clock):
    provider.keeps_for = 7 * DAY
    session, _ = await sleep(process())
    (paused,) = await session.list_paused()
    assert paused.expires_at.timestamp() == clock.time() + 7 * DAY


async def test_where_nothing_is_deleted_nothing_expires(process):
    session, _ = await sleep(process())
    (paused,) = await session.list_paused()
    assert (paused.expires_at, paused.expiring) == (None, False)


@pytest.mark.usefixtures("month")
async def test_the_owner_is_told_once(process, clock):
    told = []

    async def on_expiring(owner, paused):
        told.append((owner, paused.handle))

    sessions = process(retention=Retention(on_expiring=on_expiring))
    _, handle = await sleep(sessions)
    await days(sessions, clock, 26)
    assert told == []
    await days(sessions, clock, 3)
    assert told == [("ann", handle)]


@pytest.mark.usefixtures("month")
async def test_a_keeper_wakes_and_pauses_what_would_be_deleted(process, provider, clock):
    sessions = process(retention=Retention(renew=True))
    session, _ = await sleep(sessions)
    await days(sessions, clock, 29)
    (paused,) = await session.list_paused()
    assert paused.age < 3 * DAY
    assert states(provider) == ["paused"]
    assert provider.verbs().count("connect") == 1
    assert await use(session) == ["x", "x"]


@pytest.mark.usefixtures("month")
async def test_without_being_asked_nothing_is_renewed_and_nothing_ended(process, provider, clock):
    sessions = process()
    await sleep(sessions)
    before = list(provider.log)
    await days(sessions, clock, 40)
    assert provider.log == before


async def test_the_reaper_ends_what_has_been_asleep_for_too_long(process, provider, clock):
    sessions = process(retention=Retention(abandoned_after=10 * DAY))
    session, _ = await sleep(sessions)
    await days(sessions, clock, 9)
    assert states(provider) == ["paused"]
    await days(sessions, clock, 2)
    assert provider.machines == {}
    assert await use(session, "anew") == ["anew"]


async def test_the_reaper_keeps_to_its_owners_and_to_what_bears_our_stamp(process, provider, clock):
    sessions = process(retention=Retention(abandoned_after=DAY, owners=frozenset({"ann"})))
    await sleep(sessions, owner="ann")
    await sleep(sessions, owner="bob")
    provider.machines["foreign"] = Machine("foreign", {}, "paused", 0, clock.time())
    provider.machines["odd"] = Machine("odd", {"sandbox_tools.owner": "ann"}, "paused", 0, clock.time())
    await days(sessions, clock, 3)
    left = {machine.metadata.get("sandbox_tools.owner") for machine in provider.machines.values()}
    assert left == {"bob", None, "ann"}
    assert {"foreign", "odd"} < set(provider.machines)
    assert len(provider.machines) == 3
