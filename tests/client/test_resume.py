from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.client import sandbox as module
from sandbox_tools.errors import NotFoundError, StateLostError
from sandbox_tools.paths import socket_path
from tests.client.edge import RESET, Edge
from tests.machine import EngineProcess

PROBE = "GET /health"
READ = "GET /files?path=%2Fdev%2Fshm%2F.sandbox-tools&username=root"


@pytest.fixture
async def client(edge: Edge, state: Path) -> AsyncIterator[Client]:
    async with Client(provider="local", state_dir=state) as client:
        yield client


async def resumed(client: Client, sandbox: Sandbox, way: str) -> Sandbox:
    if way == "connect":
        return await client.connect(sandbox.id)

    await sandbox.resume()
    return sandbox


@pytest.mark.parametrize("way", ["connect", "resume"])
@pytest.mark.parametrize("failures", [[502], [409], [503], [504], [RESET], [RESET, 502, 409, 502]], ids=str)
async def test_the_first_request_after_a_resume_succeeds_though_the_edge_is_late(
    edge: Edge, client: Client, failures: list[int], way: str
) -> None:
    """What fails until the way to the sandbox is open again is a probe, which nobody sees, and never code."""
    sandbox = await client.create()
    await sandbox.pause()
    edge.failures = list(failures)
    edge.seen.clear()

    sandbox = await resumed(client, sandbox, way)
    await sandbox.run_code("1")

    assert [PROBE] * (len(failures) + 1) == [request for request in edge.seen if request == PROBE]
    assert ["POST /execute"] == [request for request in edge.seen if "execute" in request]


@pytest.mark.parametrize("way", ["connect", "resume"])
async def test_a_sandbox_that_was_running_is_not_probed(edge: Edge, client: Client, way: str) -> None:
    sandbox = await client.create()
    edge.seen.clear()

    await resumed(client, sandbox, way)
    assert ["POST /sandboxes/i1/connect"] == edge.seen


async def test_a_sandbox_that_cannot_be_reached_is_given_back_all_the_same(
    edge: Edge, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was resumed, and the caller must hold it to end it."""
    monkeypatch.setattr(module, "READY_LIMIT", 0.3)
    sandbox = await client.create()
    await sandbox.pause()
    edge.failures = [502] * 1000

    assert sandbox.id == (await client.connect(sandbox.id)).id


@pytest.mark.parametrize("way", ["connect", "resume"])
async def test_after_a_resume_nothing_travels_to_the_sandbox_on_a_connection_from_before(
    edge: Edge, client: Client, way: str
) -> None:
    sandbox = await client.create()
    await sandbox.list_contexts()
    await sandbox.run_code("1")
    await sandbox.pause()
    before = list(map(tuple, edge.connections))

    sandbox = await resumed(client, sandbox, way)
    await sandbox.list_contexts()
    await sandbox.run_code("1")

    inside = ("execute", "contexts", "files", "GET /health")
    late = [requests[len(old) :] for old, requests in zip(before, edge.connections, strict=False)]
    assert [] == [request for requests in late for request in requests if any(word in request for word in inside)]


async def test_a_resume_whose_answer_is_lost_is_probed_and_verified_when_it_is_repeated(
    edge: Edge, client: Client
) -> None:
    """The repeated request finds a running sandbox, which says nothing about what the first one woke."""
    sandbox = await client.create()
    await sandbox.pause()
    edge.lost = {"POST /sandboxes/i1/connect"}
    edge.on_connect = edge.files.clear
    edge.failures = [502]
    edge.seen.clear()

    with pytest.raises(StateLostError) as caught:
        await sandbox.resume()
    assert {"memory", "files"} == caught.value.lost
    assert ["POST /sandboxes/i1/connect"] * 2 + [PROBE] * 2 == edge.seen[:4]


@pytest.mark.parametrize(
    "held",
    ["POST /sandboxes/i1/connect", PROBE, "GET /files?path=%2Fdev%2Fshm%2F.sandbox-tools&username=root"],
    ids=str,
)
async def test_a_resume_that_is_cancelled_leaves_nothing_open_and_the_next_one_verifies(
    edge: Edge, client: Client, held: str
) -> None:
    sandbox = await client.create()
    await sandbox.pause()
    before, descriptors = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
    edge.held = held
    edge.on_connect = edge.files.clear
    task = asyncio.create_task(sandbox.resume())
    async with asyncio.timeout(10):
        await edge.holding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    edge.held = None
    await settled(before)
    assert len(os.listdir("/proc/self/fd")) <= descriptors

    with pytest.raises(StateLostError):
        await sandbox.resume()
    await sandbox.resume()
    await sandbox.run_code("1")


async def settled(before: set[asyncio.Task[object]]) -> None:
    """Returns once no more tasks run than did: the server's own end with their connections."""
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)


@pytest.fixture
async def real(engine: EngineProcess) -> AsyncIterator[Sandbox]:
    async with Client(provider="local", state_dir=engine.state) as client:
        sandbox = await client.create()
        yield sandbox
        await sandbox.kill()


@pytest.mark.parametrize("memory", [True, False])
async def test_code_runs_at_once_after_a_real_resume(real: Sandbox, memory: bool) -> None:
    for _ in range(3):
        await real.pause(memory=memory)
        await real.resume()
        assert "2" == (await real.run_code("1 + 1")).text


async def test_a_server_inside_is_reached_as_its_address_says_also_after_a_resume(
    real: Sandbox, engine: EngineProcess
) -> None:
    """Over the socket, as the error of `url` says, by a client that is not ours."""
    await real.files.write("index.html", "inside")
    async with await real.commands.start("exec python3 -m http.server 3000"):
        transport = httpx.AsyncHTTPTransport(uds=str(socket_path(engine.state)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as foreign, asyncio.timeout(60):
            while (await foreign.get("/", headers=real.headers(3000))).text != "inside":
                await asyncio.sleep(0.05)

            await real.pause()
            await real.resume()
            assert "inside" == (await foreign.get("/", headers=real.headers(3000))).text


async def test_contexts_of_a_real_sandbox_keep_their_variables_apart_and_through_a_pause(real: Sandbox) -> None:
    context = await real.create_context(cwd="/tmp")
    await real.run_code("x = 1")
    await real.run_code("x = 2", context=context.id)
    await real.pause()
    await real.resume()

    assert ("1", "2") == ((await real.run_code("x")).text, (await real.run_code("x", context=context.id)).text)
    assert context in await real.list_contexts()
    await real.restart_context(context.id)
    failure = (await real.run_code("x", context=context.id)).failure
    assert failure is not None
    assert "NameError" == failure.name
    assert await real.remove_context(context.id)
    assert not await real.remove_context(context.id)
    with pytest.raises(NotFoundError):
        await real.run_code("x", context=context.id)
