from __future__ import annotations

import asyncio
import contextlib
import json
import re
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.errors import (
    ConfigError,
    ConnectError,
    ExecutionTimeoutError,
    NotFoundError,
    ProtocolError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    ServerError,
    TransportError,
)
from sandbox_tools.models import CodeContext, Ended, ExecutionEvent, Started, Stdout
from tests.client.edge import Edge
from tests.client.server import Server


@pytest.fixture
async def sandbox(client: Client) -> Sandbox:
    return await client.create()


async def test_code_runs_and_its_output_comes_back(sandbox: Sandbox) -> None:
    execution = await sandbox.run_code("print hello")

    assert ("hello", 1, None) == (execution.stdout, execution.execution_count, execution.failure)
    assert "42" == (await sandbox.run_code("value 42")).text


async def test_code_that_raises_is_a_result(sandbox: Sandbox) -> None:
    execution = await sandbox.run_code("raise oops")

    assert execution.failure is not None
    assert ("ValueError", "oops") == (execution.failure.name, execution.failure.value)


async def test_events_arrive_while_the_code_runs(sandbox: Sandbox) -> None:
    """The first event is in hand although the code never ends; closing the stream interrupts it."""
    async with aclosing(sandbox.stream_code("hang")) as events:
        assert isinstance(await anext(events), Started)
        assert "begun" == (await anext(events)).text  # type: ignore[union-attr]


async def test_on_event_sees_what_the_stream_gives(sandbox: Sandbox) -> None:
    seen: list[ExecutionEvent] = []
    await sandbox.run_code("print a", on_event=seen.append)

    assert [Started, Stdout, Ended] == [type(event) for event in seen]


async def test_output_without_end_leaves_both_its_ends(sandbox: Sandbox) -> None:
    execution = await sandbox.run_code("flood 50")

    assert len(execution.stdout) < 200_000
    assert execution.stdout_omitted > 49_000_000


async def test_code_past_its_timeout_is_disconnected_and_leaves_what_it_had_said(
    sandbox: Sandbox, server: Server
) -> None:
    with pytest.raises(ExecutionTimeoutError) as caught:
        await sandbox.run_code("hang", timeout=0.5)

    assert caught.value.partial is not None
    assert "begun" == caught.value.partial.stdout
    assert await asyncio.to_thread(server.disconnected.wait, 5)
    assert "after" == (await sandbox.run_code("print after")).stdout


@pytest.mark.parametrize("way", ["cancelled", "closed", "callback raises"])
async def test_a_caller_that_goes_away_closes_the_connection(sandbox: Sandbox, server: Server, way: str) -> None:
    """The closed connection is what interrupts the code on the server's side."""
    begun = asyncio.Event()

    def on_event(event: ExecutionEvent) -> None:
        if isinstance(event, Stdout):
            begun.set()
            if way == "callback raises":
                raise ZeroDivisionError

    async def close_early() -> None:
        async with aclosing(sandbox.stream_code("hang", timeout=None)) as events:
            async for event in events:
                on_event(event)
                if begun.is_set():
                    return

    if way == "closed":
        await close_early()
    else:
        task = asyncio.create_task(sandbox.run_code("hang", timeout=None, on_event=on_event))
        async with asyncio.timeout(5):
            await begun.wait()
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, (asyncio.CancelledError, ZeroDivisionError))
    assert await asyncio.to_thread(server.disconnected.wait, 5)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("stop", ProtocolError),
        ("garbage", ProtocolError),
        ("break", TransportError),
        ("killed", SandboxExpiredError),
        ("paused", SandboxStateError),
    ],
)
async def test_a_stream_that_breaks_is_never_a_success_and_says_why(
    sandbox: Sandbox, server: Server, code: str, error: type[SandboxError]
) -> None:
    with pytest.raises(SandboxError) as caught:
        await sandbox.run_code(code)

    assert error is type(caught.value)
    assert [code] == server.executions


async def test_a_paused_sandbox_says_so_and_runs_code_again_after_its_resume(sandbox: Sandbox) -> None:
    await sandbox.pause()
    with pytest.raises(SandboxStateError) as caught:
        await sandbox.run_code("print 1")
    assert not isinstance(caught.value, SandboxExpiredError)

    await sandbox.resume()
    assert "1" == (await sandbox.run_code("print 1")).stdout


async def test_a_killed_sandbox_is_expired(sandbox: Sandbox) -> None:
    await sandbox.kill()

    with pytest.raises(SandboxExpiredError):
        await sandbox.run_code("print 1")


async def test_an_unknown_context_is_not_found(sandbox: Sandbox) -> None:
    with pytest.raises(NotFoundError):
        await sandbox.run_code("print 1", context="nowhere")


@pytest.mark.parametrize(
    ("arguments"), [{"timeout": 0}, {"timeout": -1}, {"context": "c", "language": "python"}], ids=str
)
async def test_arguments_that_cannot_work_are_refused_before_anything_runs(
    sandbox: Sandbox, server: Server, arguments: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        await sandbox.run_code("print 1", **arguments)  # type: ignore[arg-type]
    assert not server.executions


@pytest.mark.parametrize(
    ("failure", "sent", "error"),
    [
        (httpx.ConnectError("refused"), 4, ConnectError),
        (httpx.ReadError("cut"), 1, TransportError),
        (httpx.WriteError("cut"), 1, TransportError),
        (httpx.RemoteProtocolError("disconnected"), 1, TransportError),
        (httpx.Response(409, json={"code": 409, "message": "transitioning"}), 1, SandboxBusyError),
        (httpx.Response(500, text="no kernel"), 1, ServerError),
        (httpx.Response(404, text="no such page"), 1, ProtocolError),
        (httpx.Response(502, json={"code": 502, "message": "The sandbox was not found"}), 1, TransportError),
    ],
    ids=str,
)
async def test_code_is_sent_again_only_if_no_connection_came_about(
    failure: Exception | httpx.Response, sent: int, error: type[SandboxError]
) -> None:
    executions: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/execute":
            return httpx.Response(201, json=Server().grant("i1") | {**Server().row_of("i1")})

        executions.append(request)
        if isinstance(failure, Exception):
            raise failure

        return failure

    async with Client(provider="e2b", api_key="k", transport=httpx.MockTransport(handler)) as client:
        sandbox = await client.create()
        with pytest.raises(error):
            await sandbox.run_code("print 1")
    assert sent == len(executions)
    assert "X-API-KEY" not in executions[0].headers


@pytest.mark.parametrize("closing", [False, True], ids=["kept", "closed by the server as the code arrives"])
async def test_code_is_sent_once_also_on_a_used_connection_and_a_create_never_travels_on_one(
    state: Path, closing: bool
) -> None:
    requests: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[str] = []
        requests.append(mine)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: (\d+)", head.lower())
                await reader.readexactly(int(length.group(1)) if length else 0)
                path = head.split()[1].decode()
                mine.append(path)
                if closing and mine.count("/execute") == 2:
                    break
                grant = json.dumps(Server().row_of("i1")).encode()
                body = b'{"type": "end_of_execution"}\n' if path == "/execute" else grant
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async with await asyncio.start_unix_server(serve, state / "engine.sock"):
        async with Client(provider="local", state_dir=state) as client:
            sandbox = await client.create()
            await sandbox.info()
            await sandbox.run_code("print 1")
            if closing:
                with pytest.raises(TransportError) as caught:
                    await sandbox.run_code("print 2")
                assert caught.value.retryable is None
            else:
                await sandbox.run_code("print 2")
            await client.create()

    assert [mine for mine in requests if mine.count("/execute") == 2], "no connection was used again"
    assert sum(mine.count("/execute") for mine in requests) == 2
    assert [mine for mine in requests if "/v2/sandboxes" in mine] == [["/v2/sandboxes"], ["/v2/sandboxes"]]


async def test_many_executions_at_once_do_not_wait_for_each_others_connections(client: Client, server: Server) -> None:
    sandboxes = [await client.create() for _ in range(3)]
    begun = asyncio.Semaphore(0)

    def on_event(event: ExecutionEvent) -> None:
        if isinstance(event, Stdout):
            begun.release()

    async with asyncio.TaskGroup() as group:
        hanging = [
            group.create_task(sandboxes[n % 3].run_code("hang", timeout=None, on_event=on_event)) for n in range(120)
        ]
        async with asyncio.timeout(20):
            for _ in hanging:
                await begun.acquire()
        assert "free" == (await sandboxes[0].run_code("print free", timeout=20)).stdout
        for task in hanging:
            task.cancel()


async def test_an_answer_is_read_to_its_end_so_that_no_server_takes_it_for_an_interrupt(
    sandbox: Sandbox, server: Server
) -> None:
    await sandbox.run_code("linger")

    assert await asyncio.to_thread(server.answered.wait, 5)
    assert not server.disconnected.is_set()


async def test_contexts_are_made_listed_restarted_and_removed(edge: Edge, at_edge: Sandbox) -> None:
    made = await at_edge.create_context(language="javascript", cwd="/srv")
    assert ("c2", "javascript", "/srv") == (made.id, made.language, made.cwd)
    assert ("python", "/tmp") == ((made := await at_edge.create_context()).language, made.cwd)
    assert [b'{"language":"javascript","cwd":"/srv"}', b"{}"] == edge.bodies["POST /contexts"]
    assert ["c1"] == [context.id for context in await at_edge.list_contexts()]

    await at_edge.restart_context("c1")
    assert await at_edge.remove_context("c1")
    assert not await at_edge.remove_context("c9")
    with pytest.raises(NotFoundError):
        await at_edge.restart_context("c9")


async def test_contexts_in_an_object_are_a_list_too(edge: Edge, at_edge: Sandbox) -> None:
    """PPIO's servers may answer so (PROTOCOL.md 3.1)."""
    edge.contexts = b'{"contexts": [{"id": "c1", "language": "python", "cwd": "/"}], "total": 1}'
    assert [CodeContext(id="c1", language="python", cwd="/")] == await at_edge.list_contexts()


@pytest.mark.parametrize("answer", [b"", b"null", b"[1]", b"{}", b"<html>", b'[{"id": 1}]', b"\xff"], ids=str)
async def test_an_answer_that_is_no_list_of_contexts_is_of_no_protocol(
    edge: Edge, at_edge: Sandbox, answer: bytes
) -> None:
    edge.contexts = answer
    with pytest.raises(ProtocolError):
        await at_edge.list_contexts()


@pytest.mark.parametrize("context_id", ["../../sandboxes/i1", "..", "a/b", "a?b", "\N{SNOWMAN}", " "])
async def test_a_context_id_cannot_lead_to_another_path(edge: Edge, at_edge: Sandbox, context_id: str) -> None:
    edge.seen.clear()
    with contextlib.suppress(SandboxError):
        await at_edge.remove_context(context_id)
    assert [] == [request for request in edge.seen if not request.startswith("DELETE /contexts/")]


async def test_a_context_is_made_once(edge: Edge, at_edge: Sandbox) -> None:
    """Nobody knows whether the first one was made where its answer was lost."""
    edge.lost = {"POST /contexts"}
    with pytest.raises(TransportError) as caught:
        await at_edge.create_context()
    assert caught.value.retryable is None
    assert 1 == edge.seen.count("POST /contexts")


async def test_what_contexts_fail_of_is_named_by_its_verb(edge: Edge, at_edge: Sandbox) -> None:
    edge.state = "paused"
    for verb, call in (
        ("create_context", at_edge.create_context),
        ("list_contexts", at_edge.list_contexts),
        ("restart_context", lambda: at_edge.restart_context("c1")),
        ("remove_context", lambda: at_edge.remove_context("c1")),
    ):
        with pytest.raises(SandboxStateError) as caught:
            await call()
        assert verb == caught.value.op
        assert "code" not in str(caught.value)


@pytest.mark.parametrize(
    ("provider", "url"),
    [
        ("e2b", "https://3000-i1.e2b.app"),
        ("ppio", "https://3000-i1-c.sandbox.ppio.cn"),
        ("ucloud", "https://3000-i1.cn-wlcb.sandbox.ucloudai.com"),
        ("local", "http://localhost"),
    ],
)
async def test_a_port_has_an_address_for_everybody(provider: str, url: str) -> None:
    """A host of its own also where the provider's sandboxes share one, since not everybody sends headers."""
    answer = httpx.MockTransport(lambda _: httpx.Response(201, json=Server().grant("i1")))
    async with Client(provider=provider, api_key="k", transport=answer) as client:
        sandbox = await client.create()

    assert url == sandbox.url(3000)
    assert url.partition("://")[2] == sandbox.host(3000)
    assert "token-of-i1" not in sandbox.headers(3000).values()
    assert "token-of-i1" == sandbox.headers(49983)["X-Access-Token"]


async def test_a_port_behind_a_socket_says_how_it_is_reached(sandbox: Sandbox, state: Path) -> None:
    for ask in (sandbox.url, sandbox.host):
        with pytest.raises(ConfigError, match=re.escape(str(state / "engine.sock"))):
            ask(3000)
    assert {"E2b-Sandbox-Id": sandbox.id, "E2b-Sandbox-Port": "3000"} == sandbox.headers(3000)
