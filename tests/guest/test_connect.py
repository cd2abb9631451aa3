"""What Connect's framing promises: each call is answered or refused in words; none hangs or takes the guest along."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette

from sandbox_tools.guest import connect
from sandbox_tools.guest.connect import Call, RpcError
from sandbox_tools.guest.envelopes import HEADER, end, envelope
from tests.guest.conftest import served

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Handlers:
    """A service that shows what the framework does with it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.closed = asyncio.Event()

    async def echo(self, call: Call) -> dict[str, Any]:
        """Says what came in, and from whom."""
        return {"message": call.message, "user": call.account.name, "timeout": call.timeout}

    async def fail(self, call: Call) -> dict[str, Any]:
        """Fails as it is told to, or in a way that nobody told it."""
        if code := call.message.get("code"):
            raise RpcError(code, "As you asked.")
        raise ZeroDivisionError("a secret")

    async def wait(self, call: Call) -> dict[str, Any]:
        """Never answers."""
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.set()
        return {}

    async def count(self, call: Call) -> AsyncIterator[dict[str, Any] | bytes]:
        """Counts, then does what it is told."""
        try:
            for number in range(call.message.get("to", 0)):
                yield {"number": number}
            if call.message.get("joined"):
                yield envelope({"number": "a"}) + envelope({"number": "b"})
            if code := call.message.get("code"):
                raise RpcError(code, "As you asked.")
            if call.message.get("wait"):
                self.begun.set()
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # a clean-up may wait, and is not cut short
            self.closed.set()

    async def total(self, call: Call, messages: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
        """Adds up."""
        return {"total": sum([message["number"] async for message in messages])}


class Service:
    """The service behind a real server."""

    def __init__(self, http: httpx.AsyncClient, path: Path, handlers: Handlers) -> None:
        self.http = http
        self.path = path
        self.handlers = handlers

    async def unary(self, method: str, body: Any = None, *, content: bytes | None = None, **headers: str) -> Any:
        """Status and body of an answer."""
        data = json.dumps(body or {}).encode() if content is None else content
        answer = await self.http.post(f"/t.S/{method}", content=data, headers=named("application/json", headers))
        assert answer.headers["content-type"] == "application/json"
        return answer.status_code, answer.json()

    async def stream(self, method: str, content: bytes, **headers: str) -> list[tuple[int, Any]]:
        """The envelopes of an answer, with their flags."""
        answer = await self.http.post(
            f"/t.S/{method}", content=content, headers=named("application/connect+json", headers)
        )
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/connect+json"
        return envelopes(answer.content)


def named(kind: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Headers, of which a test writes the names as Python can."""
    return {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}


def envelopes(data: bytes) -> list[tuple[int, Any]]:
    """Flags and message of each envelope."""
    found = []
    while data:
        flags, length = HEADER.unpack_from(data)
        assert len(data) >= HEADER.size + length
        found.append((flags, json.loads(data[HEADER.size : HEADER.size + length])))
        data = data[HEADER.size + length :]
    return found


def code_at_end(found: list[tuple[int, Any]]) -> str | None:
    """How a stream ended; None: well."""
    flags, last = found[-1]
    assert flags == 2
    return last["error"]["code"] if last else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """One service for all tests of this module."""
    handlers = Handlers()
    routes = connect.service(
        "t.S",
        {
            "Echo": connect.unary(handlers.echo),
            "Fail": connect.unary(handlers.fail),
            "Wait": connect.unary(handlers.wait),
            "Count": connect.server_stream(handlers.count, keepalive={"alive": True}),
            "Total": connect.client_stream(handlers.total),
        },
    )
    path = tmp_path_factory.mktemp("connect") / "s"
    async with served(Starlette(routes=routes), path) as http:
        yield Service(http, path, handlers)


@pytest_asyncio.fixture(loop_scope="module")
async def rpc(shared: Service) -> Service:
    """The service, with nothing in it from other tests."""
    shared.handlers.begun.clear()
    shared.handlers.closed.clear()
    return shared


async def test_a_unary_call_is_answered_in_bare_json(rpc: Service) -> None:
    status, body = await rpc.unary("Echo", {"a": "ä"}, connect_timeout_ms="1500")

    assert status == 200
    assert (body["message"], body["timeout"]) == ({"a": "ä"}, 1.5)


async def test_a_deadline_of_0_is_none(rpc: Service) -> None:
    assert (await rpc.unary("Echo", connect_timeout_ms="0"))[1]["timeout"] is None


@pytest.mark.parametrize(("code", "status"), connect.STATUSES.items())
async def test_an_error_of_a_unary_call_has_connects_code_and_https_status(
    rpc: Service, code: str, status: int
) -> None:
    assert await rpc.unary("Fail", {"code": code}) == (status, {"code": code, "message": "As you asked."})


async def test_a_handlers_own_failure_is_internal_and_tells_nothing(rpc: Service) -> None:
    status, body = await rpc.unary("Fail")

    assert (status, body["code"]) == (500, "internal")
    assert "secret" not in body["message"]


@pytest.mark.parametrize(
    "kind", ["application/proto", "application/connect+json", "text/plain", "application/json; a=b"]
)
async def test_another_content_type_is_415_with_a_connect_error(rpc: Service, kind: str) -> None:
    answer = await rpc.http.post("/t.S/Echo", content=b"{}", headers={"content-type": kind})

    assert (answer.status_code, answer.json()["code"]) == (415, "unimplemented")
    assert "application/json" in answer.json()["message"]


@pytest.mark.parametrize("kind", ["application/connect+proto", "application/json", "application/grpc"])
@pytest.mark.parametrize("method", ["Count", "Total"])
async def test_so_it_is_for_streams(rpc: Service, method: str, kind: str) -> None:
    answer = await rpc.http.post(f"/t.S/{method}", content=envelope({}), headers={"content-type": kind})

    assert (answer.status_code, answer.json()["code"]) == (415, "unimplemented")


async def test_a_charset_is_no_other_content_type(rpc: Service) -> None:
    assert (await rpc.unary("Echo", content_type="application/json; charset=UTF-8"))[0] == 200


async def test_compressed_bodies_are_refused(rpc: Service) -> None:
    assert (await rpc.unary("Echo", content_encoding="gzip"))[1]["code"] == "unimplemented"
    answer = await rpc.http.post(
        "/t.S/Count",
        content=envelope({}),
        headers={"content-type": "application/connect+json", "connect-content-encoding": "gzip"},
    )
    assert answer.json()["code"] == "unimplemented"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
async def test_a_body_that_is_no_message_is_an_invalid_argument(rpc: Service, body: bytes) -> None:
    status, answer = await rpc.unary("Echo", content=body)

    assert (status, answer["code"]) == (400, "invalid_argument")


async def test_a_body_that_is_too_long_is_refused_before_it_is_all_there(rpc: Service) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b" " * 65536

    answer = await rpc.http.post("/t.S/Echo", content=endless(), headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (429, "resource_exhausted")


@pytest.mark.parametrize("value", ["-1", "1.5", "x", "", "12345678901", "\u0663".encode().decode("latin-1")])
async def test_a_deadline_that_is_no_number_is_an_invalid_argument(rpc: Service, value: str) -> None:
    answer = await rpc.http.post(
        "/t.S/Echo",
        content=b"{}",
        headers=[(b"content-type", b"application/json"), (b"connect-timeout-ms", value.encode("latin-1"))],
    )

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


async def test_a_unary_call_ends_at_its_deadline(rpc: Service) -> None:
    status, body = await rpc.unary("Wait", connect_timeout_ms="50")

    assert (status, body["code"]) == (504, "deadline_exceeded")
    assert rpc.handlers.closed.is_set()


async def test_a_unary_call_ends_when_its_caller_leaves(rpc: Service) -> None:
    asking = asyncio.create_task(rpc.unary("Wait"))
    await rpc.handlers.begun.wait()
    asking.cancel()

    await asyncio.wait_for(rpc.handlers.closed.wait(), 30)


async def test_who_calls_is_in_basic_authorization(rpc: Service) -> None:
    def basic(text: bytes) -> str:
        return "Basic " + base64.b64encode(text).decode()

    default = (await rpc.unary("Echo"))[1]["user"]
    assert (await rpc.unary("Echo", authorization=basic(b"root:")))[1]["user"] == "root"
    assert (await rpc.unary("Echo", authorization=basic(b":")))[1]["user"] == default
    assert (await rpc.unary("Echo", authorization="Bearer x"))[1]["user"] == default
    for authorization in (basic(b"nobody-of-that-name:"), basic(b"a\0b:"), basic(b"\xff:"), "Basic !", "Basic é"):
        answer = await rpc.http.post(
            "/t.S/Echo",
            content=b"{}",
            headers=[(b"content-type", b"application/json"), (b"authorization", authorization.encode())],
        )
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), authorization
    found = await rpc.stream("Count", envelope({"to": 3}), authorization=basic(b"nobody-of-that-name:"))
    assert [code_at_end(found), len(found)] == ["unauthenticated", 1]


async def test_a_stream_is_its_messages_and_its_end(rpc: Service) -> None:
    found = await rpc.stream("Count", envelope({"to": 2, "joined": True}))

    assert found == [*((0, {"number": number}) for number in (0, 1, "a", "b")), (2, {})]


async def test_a_stream_that_fails_ends_with_the_error_after_what_came_before(rpc: Service) -> None:
    found = await rpc.stream("Count", envelope({"to": 1, "code": "not_found"}))

    assert found == [(0, {"number": 0}), (2, {"error": {"code": "not_found", "message": "As you asked."}})]


async def test_a_handler_that_breaks_in_a_stream_is_internal(rpc: Service) -> None:
    found = await rpc.stream("Count", envelope({"to": "many"}))

    assert code_at_end(found) == "internal"


async def test_a_stream_ends_at_its_deadline(rpc: Service) -> None:
    found = await rpc.stream("Count", envelope({"to": 1, "wait": True}), connect_timeout_ms="100")

    assert [found[0], code_at_end(found)] == [(0, {"number": 0}), "deadline_exceeded"]
    assert rpc.handlers.closed.is_set()


async def test_silence_is_filled_with_keepalives(rpc: Service) -> None:
    found = await rpc.stream(
        "Count", envelope({"to": 1, "wait": True}), keepalive_ping_interval="1", connect_timeout_ms="2500"
    )

    assert found[1:3] == [(0, {"alive": True})] * 2


async def test_before_the_handlers_first_message_there_is_no_keepalive(rpc: Service) -> None:
    found = await rpc.stream("Count", envelope({"wait": True}), keepalive_ping_interval="1", connect_timeout_ms="1500")

    assert len(found) == 1


async def test_a_handler_is_closed_when_the_reader_of_its_stream_leaves(rpc: Service) -> None:
    headers = {"content-type": "application/connect+json"}
    async with rpc.http.stream("POST", "/t.S/Count", content=envelope({"wait": True}), headers=headers):
        await rpc.handlers.begun.wait()

    await asyncio.wait_for(rpc.handlers.closed.wait(), 30)


@pytest.mark.parametrize("body", [b"", envelope({}) * 2, envelope({})[:-1], envelope({}, 1), HEADER.pack(0, 1 << 31)])
async def test_a_request_for_a_stream_is_one_whole_message(rpc: Service, body: bytes) -> None:
    found = await rpc.stream("Count", body)

    assert len(found) == 1
    assert code_at_end(found) in ("invalid_argument", "unimplemented", "resource_exhausted")


async def test_a_stream_of_the_callers_is_answered_once(rpc: Service) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        data = b"".join(envelope({"number": number}) for number in range(10))
        for at in range(0, len(data), 7):
            yield data[at : at + 7]

    answer = await rpc.http.post("/t.S/Total", content=pieces(), headers={"content-type": "application/connect+json"})

    assert envelopes(answer.content) == [(0, {"total": 45}), (2, {})]


@pytest.mark.parametrize(
    "tail", [b"\0", envelope({"number": 1}, 1), HEADER.pack(0, 9) + b"{}", HEADER.pack(0, 1) + b"x"]
)
async def test_a_stream_of_the_callers_that_breaks_is_an_error_and_no_answer(rpc: Service, tail: bytes) -> None:
    found = await rpc.stream("Total", envelope({"number": 1}) + tail)

    assert len(found) == 1
    assert code_at_end(found) in ("invalid_argument", "unimplemented")


async def test_a_stream_of_the_callers_that_stalls_ends_at_its_deadline(rpc: Service) -> None:
    """By hand, because httpx looks at no answer before it has sent all of its request."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_unix_connection(rpc.path)
        first = envelope({"number": 1})
        writer.write(
            b"POST /t.S/Total HTTP/1.1\r\nHost: guest\r\nContent-Type: application/connect+json\r\n"
            b"Connect-Timeout-Ms: 50\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(first), first)
        )
        last = end(("deadline_exceeded", "The call's deadline of 0.05 s has passed."))
        assert (await reader.readuntil(last)).startswith(b"HTTP/1.1 200 ")
        writer.close()
