"""What a transaction keeps whoever waits for it: its order, its end, and a word on why it could not be."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from sandbox_tools.errors import TransportError
from sandbox_tools.session.bindings import SqliteBindings
from tests.session.stores import STORES, bindings_at, place_of


@pytest.fixture(params=STORES)
async def bindings(request, tmp_path):
    made = bindings_at(place_of(request.param, request, tmp_path))
    yield made
    await made.aclose()


@contextlib.asynccontextmanager
async def busy(bindings):
    """All of its workers have something to do, so that calls made in here wait for one."""
    gate = threading.Event()
    at_work = [asyncio.create_task(bindings._database.transact(lambda db: gate.wait(30))) for _ in range(4)]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        gate.set()
        await asyncio.gather(*at_work)


async def cancelled(call):
    task = asyncio.create_task(call)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_that_waits_is_made_even_if_its_caller_is_cancelled(bindings):
    async with busy(bindings):
        await cancelled(bindings.current("ann", "t", 0))
    async with asyncio.timeout(10):
        while await bindings.find("ann", "t") is None:
            await asyncio.sleep(0.01)


async def test_the_end_of_a_use_never_overtakes_its_beginning(bindings):
    """Its lease would be left otherwise, renewed for as long as the process lives."""
    handle = (await bindings.current("ann", "t", 0)).handle
    more = {"holder": "me", "now": 0.0, "until": 60.0}
    for number in range(40):
        use = f"u{number}"
        with contextlib.ExitStack() as slow:
            if number % 2:
                slow.enter_context(slow_beginnings(bindings, use))
            await cancelled(bindings.begin_lease("ann", "t", handle, use=use, **more))
            ending = asyncio.create_task(bindings.end_use(use, 1.0))
            await asyncio.sleep(0.001)
        assert await ending == handle
    assert await bindings.begin_transition(handle, holder="me", now=2.0, until=60.0, unless="leased")


@contextlib.contextmanager
def slow_beginnings(bindings, use):
    """A lease's transaction that is begun in here has to wait until the end of this."""
    gate, inner = threading.Event(), bindings._database._transact

    def transact(work):
        def waiting(db):
            if "begin_lease" in work.__qualname__:
                gate.wait(10)
            return work(db)

        return inner(waiting)

    bindings._database._transact = transact
    try:
        yield
    finally:
        bindings._database._transact = inner
        gate.set()


async def test_a_full_disk_is_said_in_words_and_undoes_what_was_begun(tmp_path):
    bindings = SqliteBindings(tmp_path / "sessions.db")
    await bindings.current("ann", "first", 0)
    [pages] = await bindings._database.transact(lambda db: db.rows("PRAGMA page_count"))
    await bindings._database.transact(lambda db: db.rows(f"PRAGMA max_page_count = {pages['page_count']}"))
    made = 0

    async def fill():
        nonlocal made
        for made in range(10_000):
            await bindings.current("ann", f"thread {made}", 0)

    with pytest.raises(TransportError, match=r"sessions\.db.*full") as failed:
        await fill()
    assert failed.value.retryable
    await bindings._database.transact(lambda db: db.rows("PRAGMA max_page_count = 100000"))
    assert await bindings.find("ann", f"thread {made}") is None
    assert len(await bindings.of_owner("ann")) == made + 1
    assert await bindings.current("ann", f"thread {made}", 0)
    await bindings.aclose()
