from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from sandbox_tools.client import Client
from sandbox_tools.client.client import CREATE_KEY
from sandbox_tools.client.dialects import DIALECTS, PPIO_LEGACY, Dialect
from sandbox_tools.errors import (
    APIError,
    AuthenticationError,
    ConfigError,
    RequestTimeoutError,
    SandboxError,
    SandboxStateError,
    ServerError,
    TransportError,
)
from tests.client.server import NOW
from tests.machine import EngineProcess


class Service:
    """A control plane on loopback whose creates go wrong as `faults` says, one after the other."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.faults: list[str] = []
        self.creates: list[dict[str, Any]] = []
        self.lists = 0
        self.list_breaks = 0
        self.conflicts = 0
        self.late: set[asyncio.Task[None]] = set()
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                request, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = request.split(" ")
                answer = await self.answer(method, path.partition("?")[0], headers, json.loads(body or b"{}"))
                if answer is None:
                    writer.transport.abort()
                    return
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, method: str, path: str, headers: dict[str, str], body: dict[str, Any]) -> bytes | None:
        if method == "POST" and path.endswith("/sandboxes"):
            return await self.create(headers, body)
        if path == "/v2/sandboxes":
            self.lists += 1
            if self.list_breaks:
                self.list_breaks -= 1
                return None
            return said(200, [self.row(sandbox_id) for sandbox_id in self.made])
        if self.conflicts:
            self.conflicts -= 1
            return said(409, problem(409))
        sandbox_id = path.split("/")[-2]
        return said(200, self.grant(sandbox_id)) if sandbox_id in self.made else said(404, problem(404))

    async def create(self, headers: dict[str, str], body: dict[str, Any]) -> bytes | None:
        fault = self.faults.pop(0) if self.faults else ""
        self.creates.append(body)
        self.begun.set()
        match fault:
            case "before":
                return None
            case "later":
                self.late.add(asyncio.create_task(self.make_later(headers, body)))
                return None
            case "never":
                await self.go_on.wait()
                return None
            case "500":
                return said(500, problem(500))
            case "503":
                return said(503, problem(503))
        sandbox_id = self.make(headers, body)
        match fault:
            case "after":
                return None
            case "after, silent":
                await self.go_on.wait()
                return None
            case "after, 504":
                return said(504, problem(504))
            case "after, half":
                return said(201, self.grant(sandbox_id))[:-20] + b" " * 20
        return said(201, self.grant(sandbox_id))

    def make(self, headers: dict[str, str], body: dict[str, Any]) -> str:
        key = headers.get("idempotency-key", f"none {len(self.made)}")
        if key not in self.keys:
            self.keys[key] = f"i{len(self.made)}"
            self.made[self.keys[key]] = body
        return self.keys[key]

    async def make_later(self, headers: dict[str, str], body: dict[str, Any]) -> None:
        await asyncio.sleep(0.3)
        self.make(headers, body)

    def grant(self, sandbox_id: str) -> dict[str, Any]:
        return {"templateID": "t", "sandboxID": sandbox_id, "clientID": "", "envdVersion": "0.6.13"}

    def row(self, sandbox_id: str) -> dict[str, Any]:
        more = {"startedAt": NOW, "endAt": NOW, "state": "running", "metadata": self.made[sandbox_id]["metadata"]}
        return {**self.grant(sandbox_id), **more}


def problem(status: int) -> dict[str, Any]:
    return {"code": status, "message": "because"}


def said(status: int, content: Any) -> bytes:
    body = json.dumps(content).encode()
    return (
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield service
    service.go_on.set()
    server.close()
    await asyncio.gather(*service.late)


Connect = Callable[..., Client]


@pytest.fixture
async def at(service: Service) -> AsyncIterator[Connect]:
    clients = []

    def connect(dialect: Dialect = DIALECTS["ucloud"], **more: Any) -> Client:
        more = {"request_timeout": 10.0, **more}
        clients.append(Client(provider=dialect, api_key="k", api_url=service.url, **more))
        return clients[-1]

    yield connect
    for client in clients:
        await client.aclose()


LOST = ["after", "after, 504", "after, half", "later"]


@pytest.mark.parametrize("fault", LOST)
async def test_a_create_whose_answer_was_lost_is_found_again(at: Connect, service: Service, fault: str) -> None:
    """Also one that the server was still at when the connection broke."""
    service.faults = [fault]

    sandbox = await at().create(metadata={"k": "v"})

    assert ([sandbox.id], 1) == (list(service.made), len(service.creates))
    assert "v" == service.made[sandbox.id]["metadata"]["k"]


@pytest.mark.parametrize("fault", LOST)
async def test_where_the_server_knows_keys_a_lost_create_is_sent_again_and_makes_no_second_one(
    at: Connect, service: Service, fault: str
) -> None:
    service.faults = [fault, "before"]

    sandbox = await at(DIALECTS["e2b"]).create()

    assert [sandbox.id] == list(service.made)


async def test_what_may_yet_come_to_be_is_said_so_and_found_by_its_key(at: Connect, service: Service) -> None:
    service.faults = ["before"]
    client = at(request_timeout=0.5)

    with pytest.raises(TransportError) as caught:
        await client.create(timeout=77)
    assert (None, 1, {}) == (caught.value.retryable, len(service.creates), service.made)
    key = re.findall(r"idempotency_key='([a-z0-9-]+)'", str(caught.value))[0]
    assert key == service.creates[0]["metadata"][CREATE_KEY]

    service.make({}, service.creates[0])  # It has come to be after all.
    assert "i0" == (await client.create(timeout=77, idempotency_key=key)).id
    assert 1 == len(service.creates)


async def test_a_failed_create_that_left_nothing_is_not_tried_again(at: Connect, service: Service) -> None:
    for dialect, fault in (("ucloud", "500"), ("ucloud", "503"), ("e2b", "500")):
        service.faults, service.creates = [fault], []
        with pytest.raises(ServerError) as caught:
            await at(DIALECTS[dialect], request_timeout=0.5).create()
        assert (1, None) == (len(service.creates), caught.value.retryable)
        assert service.lists > 1
    assert {} == service.made


async def test_a_key_of_ones_own_gives_the_sandbox_that_it_made(at: Connect, service: Service) -> None:
    for dialect in (DIALECTS["ucloud"], DIALECTS["e2b"], PPIO_LEGACY):
        service.made, service.keys = {}, {}
        first = await at(dialect).create(idempotency_key="my-key")
        assert first.id == (await at(dialect).create(idempotency_key="my-key")).id
        assert first.id != (await at(dialect).create(idempotency_key="another")).id


async def test_a_key_that_several_sandboxes_bear_is_refused_instead_of_guessed(at: Connect, service: Service) -> None:
    """Forks bear the metadata of their original."""
    await at().create(idempotency_key="my-key")
    service.made["fork"] = service.made["i0"]

    with pytest.raises(SandboxStateError, match=r"i0.*fork"):
        await at().create(idempotency_key="my-key")
    assert 1 == len(service.creates)


async def test_nothing_is_created_while_it_is_not_known_what_a_key_has_made(at: Connect, service: Service) -> None:
    service.list_breaks = 100

    with pytest.raises(TransportError):
        await at().create(idempotency_key="my-key")
    assert [] == service.creates


async def test_the_look_for_a_key_the_create_and_the_look_for_its_lost_answer_have_one_time_together(
    at: Connect, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = at()
    client._long, client._look = 0.4, 0.1
    answer, send = service.answer, client.transport.send
    deadlines = {}

    async def slow(method: str, path: str, *rest: Any) -> bytes | None:
        await (asyncio.sleep(0.2) if method == "GET" else service.go_on.wait())
        return await answer(method, path, *rest)

    async def recorded(call: Any) -> Any:
        deadlines.setdefault(call.op, call.deadline)
        return await send(call)

    monkeypatch.setattr(service, "answer", slow)
    client.transport.send = recorded  # type: ignore[method-assign]
    with pytest.raises(RequestTimeoutError) as caught:
        await client.create(idempotency_key="my-key")
    assert caught.value.op == "create"
    assert deadlines["create"] < 0.3 - 0.15

    client._long = 0.2  # gone with the first look
    with pytest.raises(RequestTimeoutError) as caught:
        await client.create(idempotency_key="another")
    assert (caught.value.op, []) == ("create", service.creates)


async def test_a_look_that_breaks_is_taken_again(at: Connect, service: Service) -> None:
    service.faults, service.list_breaks, service.conflicts = ["after"], 6, 1

    assert "i0" == (await at().create()).id


async def test_a_create_that_is_not_answered_in_time_is_looked_for_in_the_time_that_is_left(
    at: Connect, service: Service
) -> None:
    service.faults = ["after, silent", "never"]
    client = at()
    client._long, client._look = 10.2, 10.0  # 0.2 s until it gives up, and then 10 s to look.

    assert "i0" == (await client.create()).id

    client._look, client._long = 0.3, 0.5
    with pytest.raises(RequestTimeoutError) as caught:
        await client.create()
    assert (None, 2) == (caught.value.retryable, len(service.creates))


async def test_a_doubt_outlives_a_later_attempt_that_never_left(at: Connect, service: Service) -> None:
    """The connection breaks, and then there is no server any more: the first attempt may have made it."""
    service.faults = ["after"]
    server = service.serve

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        listening.close()
        await server(reader, writer)

    listening = await asyncio.start_server(once, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with Client(provider=DIALECTS["e2b"], api_key="k", api_url=url, request_timeout=0.5) as client:
        with pytest.raises(TransportError) as caught:
            await client.create()
    assert caught.value.retryable is None
    assert "idempotency_key=" in str(caught.value)


async def test_a_cancelled_create_sends_nothing_more_and_leaves_no_task(at: Connect, service: Service) -> None:
    service.faults = ["never"]
    client = at()
    before = asyncio.all_tasks()
    task = asyncio.create_task(client.create())
    await service.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (1, 0) == (len(service.creates), service.lists)
    service.go_on.set()
    left = [task for task in asyncio.all_tasks() - before if "serve" not in repr(task)]
    assert [] == left


async def test_a_cancelled_look_leaves_no_task(at: Connect, service: Service) -> None:
    service.faults = ["before"]
    before = asyncio.all_tasks()
    task = asyncio.create_task(at(request_timeout=60.0).create())
    async with asyncio.timeout(10):
        while not service.lists:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [] == [task for task in asyncio.all_tasks() - before if "serve" not in repr(task)]


BODIES: list[tuple[Dialect, dict[str, Any], dict[str, Any]]] = [
    (DIALECTS["e2b"], {}, {"autoPause": True}),
    (DIALECTS["e2b"], {"pause_memory": False}, {"autoPause": True, "autoPauseMemory": False}),
    (DIALECTS["e2b"], {"auto_resume": True}, {"autoPause": True, "autoResume": {"enabled": True}}),
    (DIALECTS["e2b"], {"internet": False}, {"autoPause": True, "allow_internet_access": False}),
    (DIALECTS["ucloud"], {"secure": False}, {"autoPause": True, "secure": False, "allow_internet_access": True}),
    (
        replace(DIALECTS["ppio"], by_domain={}),
        {"auto_pause": False},
        {"autoPause": False, "secure": True, "allow_internet_access": True},
    ),
    (
        DIALECTS["novita"],
        {"auto_resume": True, "internet": False},
        {"autoPause": True, "autoResume": {"enabled": True}, "secure": True, "allow_internet_access": False},
    ),
    (
        PPIO_LEGACY,
        {"auto_resume": True, "internet": False, "secure": True},
        {"autoPause": True, "secure": True, "allowInternetAccess": False, "metadata": {"auto_resume": "true"}},
    ),
]


@pytest.mark.parametrize(("dialect", "arguments", "expected"), BODIES, ids=lambda value: getattr(value, "name", ""))
async def test_each_option_is_said_in_the_providers_own_words(
    at: Connect, service: Service, dialect: Dialect, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    await at(dialect).create("base", timeout=9, env={"A": "1"}, **arguments)

    (body,) = service.creates
    assert re.fullmatch("[0-9a-f]{32}", body["metadata"].pop(CREATE_KEY))
    common = {"templateID": "base", "timeout": 9, "metadata": {}, "envVars": {"A": "1"}}
    assert {**common, **expected} == body


async def test_what_cannot_be_created_is_refused_before_any_request(at: Connect, service: Service) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("e2b", {"secure": False}),
        ("local", {"secure": False}),
        ("ucloud", {"auto_resume": True, "auto_pause": False}),
        ("ucloud", {"auto_resume": True, "pause_memory": False}),
        ("ppio", {"pause_memory": False}),
        ("ucloud", {"idempotency_key": "Not This"}),
        ("ucloud", {"idempotency_key": ""}),
    ]
    for provider, arguments in bad:
        with pytest.raises(ConfigError):
            await at(DIALECTS[provider]).create(**arguments)
    assert ([], 0) == (service.creates, service.lists)


async def test_the_engine_makes_one_sandbox_of_a_key_and_has_it_found(engine: EngineProcess) -> None:
    async with Client(provider="local", state_dir=engine.state) as client:
        first = await client.create("base", idempotency_key="once")
        try:
            await first.pause()
            again = await client.create("base", idempotency_key="once")
            assert (first.id, "running") == (again.id, (await again.info()).state)
            assert [first.id] == [info.sandbox_id async for info in client.list(metadata={CREATE_KEY: "once"})]

            # Even where the look finds nothing, the engine refuses another request under the same key.
            with pytest.raises(APIError) as caught:
                await client._send(
                    "create",
                    "POST",
                    "/v2/sandboxes",
                    body={"templateID": "base", "timeout": 1},
                    headers={"Idempotency-Key": "once"},
                )
            assert 422 == caught.value.status_code
        finally:
            await first.kill()


async def test_a_refusal_is_no_doubt(at: Connect, service: Service) -> None:
    class Refusing(Service):
        async def create(self, headers: dict[str, str], body: dict[str, Any]) -> bytes | None:
            return said(401, problem(401))

    service.create = Refusing.create.__get__(service)  # type: ignore[method-assign]
    with pytest.raises(AuthenticationError) as caught:
        await at().create()
    assert (False, 0) == (caught.value.retryable, service.lists)
    assert isinstance(caught.value, SandboxError)
