from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from sandbox_tools.client import Client, Sandbox, sentinel
from sandbox_tools.client.sentinel import PLACES, Sentinel, check, plant
from sandbox_tools.errors import ConfigError, ServerError, StateLostError
from sandbox_tools.paths import socket_path
from tests.client.edge import RESET, Edge
from tests.client.server import Server
from tests.machine import EngineProcess

PLANT = "POST /files?username=root"


class Recording(httpx.AsyncBaseTransport):
    """The way to an engine, on which each request is noted."""

    def __init__(self, state: Path) -> None:
        self.inner = httpx.AsyncHTTPTransport(uds=str(socket_path(state)))
        self.seen: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(f"{request.method} {request.url.path.rsplit('/', 1)[-1]}")
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.fixture
async def sandbox(on_engine: Client) -> AsyncIterator[Sandbox]:
    sandbox = await on_engine.create()
    yield sandbox
    await sandbox.kill()


async def test_a_pause_and_a_resume_that_keep_everything_are_verified(sandbox: Sandbox) -> None:
    await sandbox.run_code("x = 41")
    for _ in range(2):
        await sandbox.pause()
        await sandbox.resume()

    assert sandbox.sentinel is not None
    assert await check(sandbox, sandbox.sentinel)
    assert "42" == (await sandbox.run_code("x + 1")).text


async def test_user_code_meets_nothing_of_it(sandbox: Sandbox) -> None:
    """No name, no history, no step of the counter, no file among the user's, no process."""
    look = """import os, re
([name for name in globals() if not re.fullmatch("_i*[0-9]+", name)], len(In), dict(os.environ),
 [os.listdir(path) for path in (".", "/tmp")], [pid for pid in os.listdir("/proc") if pid.isdecimal()])"""
    await sandbox.run_code(look)
    before = await sandbox.run_code(look)
    await sandbox.pause()
    await sandbox.resume()
    after = await sandbox.run_code(look.replace("len(In)", "len(In) - 1"))

    assert before.execution_count is not None
    assert before.execution_count + 1 == after.execution_count
    assert before.text is not None
    assert before.text == after.text


async def test_memory_that_was_lost_is_said_once_and_the_sandbox_can_be_used(
    sandbox: Sandbox, engine: EngineProcess
) -> None:
    """The pause kept memory, and the resume came without it."""
    await sandbox.run_code("x = 41; open('kept', 'w').write('yes')")
    await sandbox.pause()
    with engine.http() as http:
        answer = http.post(f"/sandboxes/{sandbox.id}/connect", json={"timeout": 300, "memory": False})
    assert 201 == answer.status_code

    with pytest.raises(StateLostError) as caught:
        await sandbox.resume()
    assert ({"memory"}, "resume", sandbox.id) == (caught.value.lost, caught.value.op, caught.value.sandbox_id)
    await sandbox.resume()
    execution = await sandbox.run_code("print(open('kept').read()); x")
    assert "yes\n" == execution.stdout
    assert execution.failure is not None
    assert "NameError" == execution.failure.name


async def test_a_pause_that_keeps_files_only_is_held_to_the_files(sandbox: Sandbox) -> None:
    await sandbox.pause()
    await sandbox.resume()
    await sandbox.pause(memory=False)
    await sandbox.resume()

    assert sandbox.sentinel is not None
    assert not sandbox.sentinel.memory
    assert await check(sandbox, sandbox.sentinel)
    await sandbox.files.remove(PLACES["files"], user="root")
    with pytest.raises(StateLostError) as caught:
        await check(sandbox, sandbox.sentinel)
    assert {"files"} == caught.value.lost


async def test_files_that_were_rolled_back_are_lost_and_memory_is_not(sandbox: Sandbox) -> None:
    file = PLACES["files"]
    await sandbox.pause()
    await sandbox.resume()
    old = await sandbox.files.read(file)
    await sandbox.pause()
    assert sandbox.sentinel is not None
    kept = sandbox.sentinel
    await sandbox.resume()
    await sandbox.files.write(file, old, user="root")

    with pytest.raises(StateLostError) as caught:
        await check(sandbox, kept)
    assert {"files"} == caught.value.lost


async def test_an_older_copy_of_the_sandbox_in_its_place_has_lost_both(
    sandbox: Sandbox, on_engine: Client, engine: EngineProcess
) -> None:
    await sandbox.pause()
    await sandbox.resume()
    with engine.http() as http:
        forked = http.post(f"/sandboxes/{sandbox.id}/fork", json={}).json()[0]["sandbox"]["sandboxID"]
    copy = await on_engine.connect(forked)
    try:
        await sandbox.pause()
        assert sandbox.sentinel is not None
        with pytest.raises(StateLostError) as caught:
            await check(copy, sandbox.sentinel)
        assert {"memory", "files"} == caught.value.lost

        # The copy's own later pauses do not make it the sandbox it was copied from.
        await copy.pause()
        await copy.resume()
        with pytest.raises(StateLostError):
            await check(copy, sandbox.sentinel)
    finally:
        await copy.kill()


async def test_another_process_checks_what_was_kept_as_text(sandbox: Sandbox, engine: EngineProcess) -> None:
    await sandbox.pause()
    assert sandbox.sentinel is not None
    text = sandbox.sentinel.model_dump_json()

    async with Client(provider="local", state_dir=engine.state) as other:
        again = await other.connect(sandbox.id)
        assert await check(again, Sentinel.model_validate_json(text))


async def test_what_others_paused_later_is_not_taken_for_a_loss(sandbox: Sandbox, on_engine: Client) -> None:
    await sandbox.pause()
    other = await on_engine.connect(sandbox.id)
    await other.pause()

    await sandbox.resume()
    assert sandbox.sentinel is not None
    assert await check(sandbox, sandbox.sentinel)


async def test_what_user_code_ends_is_not_a_loss(sandbox: Sandbox) -> None:
    """A kernel that died or was restarted, and all of the user's processes: none of it did a pause lose."""
    await sandbox.pause()
    await sandbox.resume()
    assert sandbox.sentinel is not None
    (context,) = await sandbox.list_contexts()
    await sandbox.restart_context(context.id)
    await sandbox.run_code("import os; os.system('rm -rf {everything}'); os.kill(-1, 9)")

    assert await check(sandbox, sandbox.sentinel)


async def test_what_the_servers_timer_paused_is_held_to_the_last_mark(sandbox: Sandbox) -> None:
    await sandbox.pause()
    await sandbox.resume()
    await sandbox.run_code("x = 41")
    await sandbox.set_timeout(0)
    async with asyncio.timeout(60):
        while (await sandbox.info()).state != "paused":
            await asyncio.sleep(0.05)

    await sandbox.resume()
    assert "42" == (await sandbox.run_code("x + 1")).text


async def test_what_the_servers_timer_lost_is_seen_by_the_last_mark(edge: Edge, at_edge: Sandbox) -> None:
    await at_edge.pause()
    await at_edge.resume()
    edge.state = "paused"
    del edge.files[PLACES["memory"]]

    with pytest.raises(StateLostError) as caught:
        await at_edge.resume()
    assert {"memory"} == caught.value.lost


async def test_pauses_at_the_same_time_are_one_pause(sandbox: Sandbox) -> None:
    await asyncio.gather(*(sandbox.pause() for _ in range(4)))
    await sandbox.resume()

    assert sandbox.sentinel is not None
    assert await check(sandbox, sandbox.sentinel)


@pytest.mark.parametrize(
    ("verify", "expected"),
    [
        (False, ["POST pause", "POST connect", "GET health"]),
        (True, ["POST files", "POST pause", "POST connect", "GET health", "GET files", "GET files"]),
    ],
)
async def test_the_off_switch_leaves_all_of_its_requests_out(
    engine: EngineProcess, verify: bool, expected: list[str]
) -> None:
    recording = Recording(engine.state)
    async with Client(provider="local", transport=recording, verify_state=verify) as client:
        sandbox = await client.create()
        recording.seen.clear()
        await sandbox.pause()
        await sandbox.resume()
        assert expected == recording.seen

        recording.seen.clear()
        await sandbox.resume()
        assert ["POST connect"] == recording.seen
        await sandbox.kill()


@pytest.mark.parametrize("failure", [404, 500, 502, 507, RESET])
async def test_where_no_mark_can_be_left_the_sandbox_is_paused_and_resumed_unverified(
    edge: Edge, at_edge: Sandbox, failure: int
) -> None:
    edge.failures = [failure]
    assert await at_edge.pause()
    assert at_edge.sentinel is None

    await at_edge.resume()
    assert [] == [request for request in edge.seen if request.startswith("GET /files")]


async def test_a_sandbox_that_does_not_answer_is_paused_all_the_same(
    edge: Edge, at_edge: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "LIMIT", 0.2)
    edge.held = PLANT

    assert await at_edge.pause()
    assert "paused" == edge.state


@pytest.mark.parametrize("failure", [401, 404, 500, RESET])
async def test_a_mark_that_nobody_can_look_at_is_not_a_loss(edge: Edge, at_edge: Sandbox, failure: int) -> None:
    await at_edge.pause()
    edge.state = "running"
    edge.failures = [failure] * 8

    assert at_edge.sentinel is not None
    assert not await check(at_edge, at_edge.sentinel)


async def test_a_loss_that_is_seen_counts_although_the_rest_cannot_be_looked_at(edge: Edge, at_edge: Sandbox) -> None:
    await at_edge.pause()
    edge.state = "running"
    edge.files.clear()
    edge.failures = [500]

    assert at_edge.sentinel is not None
    with pytest.raises(StateLostError) as caught:
        await check(at_edge, at_edge.sentinel)
    assert 1 == len(caught.value.lost)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "i1",
        "i1 x",
        "i2 {later}",
        "i1 {earlier}",
        "i1 {later} y",
        "i1 -{later}",
        "i1 \N{SUPERSCRIPT TWO}",
        pytest.param("i1 " + 5000 * "9", id="i1 99..."),
    ],
)
async def test_whatever_else_stands_there_is_a_loss(edge: Edge, at_edge: Sandbox, text: str) -> None:
    await at_edge.pause()
    assert at_edge.sentinel is not None
    count = at_edge.sentinel.count
    edge.files = dict.fromkeys(edge.files, text.format(later=count + 1, earlier=count - 1).encode())

    with pytest.raises(StateLostError) as caught:
        await at_edge.resume()
    assert {"memory", "files"} == caught.value.lost


async def test_bytes_that_are_no_text_are_a_loss(edge: Edge, at_edge: Sandbox) -> None:
    await at_edge.pause()
    edge.files[PLACES["files"]] = b"\xff\xfe\x00"

    with pytest.raises(StateLostError) as caught:
        await at_edge.resume()
    assert {"files"} == caught.value.lost


async def test_a_pause_that_fails_after_its_mark_leaves_a_mark_that_holds(edge: Edge, at_edge: Sandbox) -> None:
    """Whoever pauses it then, the mark is there, and says no more than it did."""
    pause = "POST /sandboxes/i1/pause"
    edge.refused = {pause: 500}
    with pytest.raises(ServerError):
        await at_edge.pause()
    edge.refused = {}
    assert at_edge.sentinel is not None
    edge.state = "paused"

    await at_edge.resume()


@pytest.mark.parametrize("held", [PLANT, "POST /sandboxes/i1/pause"])
async def test_a_pause_that_is_cancelled_leaves_nothing_open_and_no_wrong_mark(
    edge: Edge, at_edge: Sandbox, held: str
) -> None:
    await at_edge.pause()
    await at_edge.resume()
    before, descriptors = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
    edge.held = held
    task = asyncio.create_task(at_edge.pause())
    async with asyncio.timeout(10):
        await edge.holding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    edge.held = None

    assert await at_edge.pause()
    await at_edge.resume()


async def test_a_pause_without_memory_is_not_held_to_it_although_its_mark_could_not_be_left(
    edge: Edge, at_edge: Sandbox
) -> None:
    await at_edge.pause()
    await at_edge.resume()
    edge.failures = [500]
    await at_edge.pause(memory=False)
    del edge.files[PLACES["memory"]]

    await at_edge.resume()


async def test_a_second_pause_sends_nothing_to_the_sandbox_which_could_wake_it(edge: Edge, at_edge: Sandbox) -> None:
    await at_edge.pause()
    edge.seen.clear()

    assert not await at_edge.pause()
    assert ["POST /sandboxes/i1/pause", "GET /sandboxes/i1"] == edge.seen


async def test_a_second_pause_without_memory_is_not_held_to_memory(edge: Edge, at_edge: Sandbox) -> None:
    """Somebody else may have woken it in between, and then it did lose its memory, as it was told to."""
    await at_edge.pause()
    await at_edge.pause(memory=False)
    del edge.files[PLACES["memory"]]

    await at_edge.resume()


async def test_marks_are_left_one_after_the_other(edge: Edge, at_edge: Sandbox) -> None:
    """Else the one that is remembered need not be the one that stays."""
    edge.held = PLANT
    pauses = [asyncio.create_task(at_edge.pause()) for _ in range(2)]
    async with asyncio.timeout(10):
        await edge.holding.wait()
        for _ in range(3):
            await at_edge.list_contexts()
        assert 1 == edge.seen.count(PLANT)
        for task in pauses:
            task.cancel()
        await asyncio.gather(*pauses, return_exceptions=True)


async def test_a_pause_that_the_provider_does_not_have_sends_nothing() -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        return httpx.Response(201, json=Server().grant("i1"))

    async with Client(provider="ppio", api_key="k", transport=httpx.MockTransport(handler)) as client:
        sandbox = await client.create()
        seen.clear()
        with pytest.raises(ConfigError):
            await sandbox.pause(memory=False)
    assert [] == seen


async def test_a_clock_that_was_set_back_does_not_make_a_mark_older(
    edge: Edge, at_edge: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await plant(at_edge)
    at_edge.sentinel = first
    monkeypatch.setattr(sentinel.time, "time_ns", lambda: 0)
    second = await plant(at_edge)

    assert first is not None
    assert second is not None
    assert second.count == first.count + 1
    assert await check(at_edge, first)
