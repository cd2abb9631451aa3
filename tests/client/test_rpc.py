from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.client import Client, Sandbox, exchange, rpc
from sandbox_tools.client.codec import ENVELOPE, EnvelopeDecoder
from sandbox_tools.errors import (
    AccessDeniedError,
    APIError,
    AuthenticationError,
    CapacityError,
    ConflictError,
    ExecutionTimeoutError,
    NotFoundError,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    ServerError,
    TransportError,
)
from sandbox_tools.models import ENVD_PORT, SandboxInfo
from tests.client.loopback import (
    ABORT,
    DONE,
    HANG,
    HEAD,
    Loopback,
    chunk,
    end,
    envelope,
    nothing_left,
    plain,
)
from tests.client.server import Server

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.tuples(st.dictionaries(st.text(), JSON, max_size=4), st.booleans()), max_size=5)

START, STAT = "process.Process/Start", "filesystem.Filesystem/Stat"


@given(MESSAGES, st.lists(st.integers(0, 40), max_size=30))
def test_wherever_a_stream_is_cut_its_messages_are_the_same(
    messages: list[tuple[dict[str, Any], bool]], cuts: list[int]
) -> None:
    data = b"".join(envelope(message, 2 * last) for message, last in messages)
    decoder = EnvelopeDecoder("test")

    found = []
    for cut in cuts:
        found += decoder.feed(data[:cut])
        data = data[cut:]
    found += decoder.feed(data)

    assert found == messages


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_are_messages_or_not_of_the_protocol(pieces: list[bytes]) -> None:
    decoder = EnvelopeDecoder("test")
    with contextlib.suppress(ProtocolError):
        for piece in pieces:
            assert all(isinstance(message, dict) for message, _ in decoder.feed(piece))


@pytest.mark.parametrize(
    "data",
    [
        ENVELOPE.pack(0, 1001),
        ENVELOPE.pack(1, 2) + b"{}",
        ENVELOPE.pack(0, 2) + b"[]",
        ENVELOPE.pack(0, 3) + b'{"a',
        b"<html>",
    ],
    ids=["too long", "compressed", "no object", "no JSON", "a web page"],
)
def test_what_is_no_envelope_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(EnvelopeDecoder("test", max_message=1000).feed(data))


def test_a_message_that_is_too_long_is_refused_at_its_header() -> None:
    """Before any of it is in memory."""
    with pytest.raises(ProtocolError, match="50000000"):
        list(EnvelopeDecoder("test", max_message=1000).feed(ENVELOPE.pack(0, 50_000_000)))


def test_half_a_surrogate_pair_in_a_message_leaves_text_that_can_be_written() -> None:
    payload = rb'{"name": "\ud800"}'

    ((message, _),) = EnvelopeDecoder("test").feed(ENVELOPE.pack(0, len(payload)) + payload)

    assert "?" == message["name"]


async def streamed(sandbox: Sandbox, *, timeout: float | None = None) -> list[dict[str, Any]]:
    async with aclosing(rpc.stream(sandbox, START, {}, timeout=timeout, op="test")) as messages:
        return [message async for message in messages]


CODES: dict[str, tuple[int, type[SandboxError], type[SandboxError]]] = {
    "invalid_argument": (400, APIError, APIError),
    "failed_precondition": (400, APIError, APIError),
    "out_of_range": (400, APIError, APIError),
    "unauthenticated": (401, AuthenticationError, AuthenticationError),
    "permission_denied": (403, AccessDeniedError, AccessDeniedError),
    "not_found": (404, NotFoundError, NotFoundError),
    "already_exists": (409, ConflictError, ConflictError),
    "aborted": (409, ConflictError, ConflictError),
    "resource_exhausted": (429, RateLimitError, RateLimitError),
    "unimplemented": (501, ServerError, ServerError),
    "internal": (500, ServerError, ServerError),
    "unknown": (500, ServerError, ServerError),
    "data_loss": (500, ServerError, ServerError),
    "canceled": (499, TransportError, TransportError),
    "unavailable": (503, TransportError, TransportError),
    "deadline_exceeded": (504, RequestTimeoutError, ExecutionTimeoutError),
    "a new one": (500, ServerError, ServerError),
}


@pytest.mark.parametrize("code", CODES)
async def test_each_code_of_connect_is_one_class_at_the_end_of_a_stream_and_as_an_answer(
    both: tuple[Loopback, Sandbox], code: str
) -> None:
    """A deadline is the request's in a call, and the command's in a stream."""
    loopback, sandbox = both
    status, of_call, of_stream = CODES[code]
    loopback.on(f"/{STAT}", [plain({"code": code, "message": "because"}, status)])
    loopback.on(
        f"/{START}", [HEAD, chunk(envelope({"n": 1}), end(code)), DONE], [plain({"code": code, "message": "b"}, status)]
    )

    with pytest.raises(SandboxError) as called:
        await rpc.unary(sandbox, STAT, {}, op="test")
    assert of_call is type(called.value)

    for _ in range(2):
        with pytest.raises(SandboxError) as caught:
            await streamed(sandbox)
        assert of_stream is type(caught.value)
        assert ("test", "i1") == (caught.value.op, caught.value.sandbox_id)
    if isinstance(called.value, APIError):
        assert code == called.value.error_code
        assert "'because'" in str(called.value)


NOT_FOUND = plain({"sandboxId": "i1", "message": "The sandbox was not found", "code": 502}, 502)

BREAKS: dict[str, list[Any]] = {
    "before the answer": [ABORT],
    "in the middle": [HEAD, chunk(envelope({"n": 1})), ABORT],
    "inside a message": [HEAD, chunk(envelope({"n": 1})[:-1]), ABORT],
    "as a clean end": [HEAD, chunk(envelope({"n": 1})), DONE],
    "as a clean end inside a message": [HEAD, chunk(envelope({"n": 1})[:-1]), DONE],
    "by the edge": [NOT_FOUND],
    "by the edge, as canceled": [HEAD, chunk(envelope({"n": 1}), end("canceled")), DONE],
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize(
    ("state_then", "error"), [("running", TransportError), ("paused", SandboxStateError), (None, SandboxExpiredError)]
)
async def test_a_stream_that_breaks_is_never_a_success_and_says_why(
    both: tuple[Loopback, Sandbox], how: str, state_then: str | None, error: type[SandboxError]
) -> None:
    loopback, sandbox = both
    loopback.on(f"/{START}", BREAKS[how])
    loopback.state = state_then

    async with nothing_left(sandbox):
        with pytest.raises(error) as caught:
            await streamed(sandbox)

    assert error is SandboxStateError or not isinstance(caught.value, SandboxBusyError)
    assert isinstance(caught.value, SandboxExpiredError) == (state_then is None)
    assert 1 == len(loopback.sent(f"/{START}"))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (plain(b"<html>no such page", 404), ProtocolError),
        (plain({"code": 404, "message": "sandbox i1 not found"}, 404), ProtocolError),
        (plain({"code": 409, "message": "The sandbox is still transitioning."}, 409), SandboxBusyError),
        (plain({"code": 401, "message": "unauthorized access"}, 401), AuthenticationError),
        (plain(b"slow down", 429, {"retry-after": "7"}), RateLimitError),
        (plain(b"no room", 503), CapacityError),
        (plain({"code": 502, "message": "The sandbox is running but port is not open"}, 502), ServerError),
        (plain(b"[]"), ProtocolError),
        (plain(b"<html>"), ProtocolError),
    ],
    ids=lambda value: value.split(b"\r\n\r\n")[1][:20].decode() if isinstance(value, bytes) else value.__name__,
)
async def test_what_lies_between_is_not_taken_for_the_sandbox_itself(
    both: tuple[Loopback, Sandbox], answer: bytes, error: type[SandboxError]
) -> None:
    """Only envd's own word may say that a file or process is not there."""
    loopback, sandbox = both
    loopback.on(f"/{STAT}", [answer])

    with pytest.raises(SandboxError) as caught:
        await rpc.unary(sandbox, STAT, {}, op="test")

    assert error is type(caught.value)
    if isinstance(caught.value, RateLimitError):
        assert 7 == caught.value.retry_after


async def test_only_what_reads_is_sent_again_after_a_connection_broke(both: tuple[Loopback, Sandbox]) -> None:
    loopback, sandbox = both
    reads = [STAT, "filesystem.Filesystem/ListDir", "process.Process/List"]
    writes = [f"filesystem.Filesystem/{name}" for name in ("MakeDir", "Move", "Remove")]
    writes += [f"process.Process/{name}" for name in ("SendInput", "CloseStdin", "SendSignal")]
    for path in reads + writes:
        loopback.on(f"/{path}", [ABORT], [plain({})])

    for path in reads:
        assert {} == await rpc.unary(sandbox, path, {}, op="test")
        assert 2 == len(loopback.sent(f"/{path}"))
    for path in writes:
        with pytest.raises(TransportError) as caught:
            await rpc.unary(sandbox, path, {}, op="test")
        assert caught.value.retryable is None
        assert 1 == len(loopback.sent(f"/{path}"))


@pytest.mark.parametrize("steps", [[HANG], [HEAD, HANG]], ids=["no answer", "half an answer"])
async def test_a_call_without_an_answer_ends_at_its_timeout_and_leaves_its_connection(
    both: tuple[Loopback, Sandbox], steps: list[Any]
) -> None:
    loopback, sandbox = both
    loopback.on(f"/{STAT}", steps)

    async with nothing_left(sandbox):
        with pytest.raises(RequestTimeoutError):
            await rpc.unary(sandbox, STAT, {}, timeout=0.2, op="test")
        async with asyncio.timeout(10):
            await loopback.left.wait()


async def test_a_stream_that_is_silent_for_too_long_counts_as_broken(
    both: tuple[Loopback, Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that has vanished says nothing, and a command without a limit would wait for it for ever."""
    loopback, sandbox = both
    loopback.on(f"/{START}", [HEAD, chunk(envelope({"n": 1})), HANG])
    monkeypatch.setattr(rpc, "SILENCE", httpx.Timeout(0.2))

    with pytest.raises(RequestTimeoutError) as caught:
        await streamed(sandbox, timeout=None)
    assert caught.value.retryable is None


@pytest.mark.parametrize("steps", [[HANG], [HEAD, HANG], [HEAD, chunk(envelope({"n": 1})), HANG]], ids=len)
@pytest.mark.parametrize("kind", ["call", "stream"])
async def test_a_cancelled_caller_leaves_no_connection_and_no_task(
    both: tuple[Loopback, Sandbox], steps: list[Any], kind: str
) -> None:
    loopback, sandbox = both
    loopback.on(f"/{START}", steps)
    async with nothing_left(sandbox):
        waiting = streamed(sandbox) if kind == "stream" else rpc.unary(sandbox, START, {}, op="test")
        task = asyncio.create_task(waiting)  # type: ignore[arg-type]
        async with asyncio.timeout(10):
            await loopback.hanging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            await loopback.left.wait()


async def test_closing_a_stream_closes_its_connection(both: tuple[Loopback, Sandbox]) -> None:
    loopback, sandbox = both
    loopback.on(f"/{START}", [HEAD, chunk(envelope({"n": 1})), HANG])

    async with nothing_left(sandbox):
        async with aclosing(rpc.stream(sandbox, START, {}, op="test")) as messages:
            assert {"n": 1} == await anext(messages)
        async with asyncio.timeout(10):
            await loopback.left.wait()


async def test_the_time_a_consumer_takes_is_not_cancelled_in_its_own_code(both: tuple[Loopback, Sandbox]) -> None:
    loopback, sandbox = both
    loopback.on(f"/{START}", [HEAD, chunk(envelope({"n": 1})), HANG])

    reached = False

    async def slowly() -> None:
        nonlocal reached
        async with aclosing(rpc.stream(sandbox, START, {}, timeout=0.01, op="test")) as messages:
            async for _ in messages:
                await asyncio.sleep(0.1 + rpc.GRACE)
                reached = True

    with pytest.raises(ExecutionTimeoutError):
        await slowly()
    assert reached


async def test_an_answer_that_is_too_long_is_refused(
    both: tuple[Loopback, Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback, sandbox = both
    loopback.on(f"/{STAT}", [plain({"entry": "x" * 2000})])
    monkeypatch.setattr(exchange, "MAX_ANSWER", 1000)

    with pytest.raises(ProtocolError):
        await rpc.unary(sandbox, STAT, {}, op="test")


async def test_calls_look_as_the_vendors_sdks_make_them(both: tuple[Loopback, Sandbox]) -> None:
    """PROTOCOL.md, 4.2."""
    loopback, sandbox = both
    loopback.on(f"/{START}", [HEAD, chunk(end()), DONE])
    loopback.on(f"/{STAT}", [plain({})])

    async with aclosing(rpc.stream(sandbox, START, {"a": "é"}, user="root", timeout=60, op="test")) as messages:
        assert [] == [message async for message in messages]
    await rpc.unary(sandbox, STAT, {"path": "/"}, op="test")

    (stream,), (call,) = loopback.sent(f"/{START}"), loopback.sent(f"/{STAT}")
    flags, length = ENVELOPE.unpack_from(stream.body)
    assert (0, {"a": "é"}) == (flags, json.loads(stream.body[5 : 5 + length]))
    common = {"connect-protocol-version": "1", "connect-timeout-ms": "60000", "accept-encoding": "identity"}
    common |= {"e2b-sandbox-id": "i1", "e2b-sandbox-port": "49983", "x-access-token": "token-of-i1"}
    special = {
        "content-type": "application/connect+json",
        "connect-content-encoding": "identity",
        "keepalive-ping-interval": "50",
        "authorization": "Basic " + base64.b64encode(b"root:").decode(),
    }
    assert common | special == {name: stream.headers.get(name) for name in common | special}
    assert common | {"content-type": "application/json"} == {
        name: call.headers.get(name) for name in [*common, "content-type"]
    }
    assert "authorization" not in call.headers


@pytest.mark.parametrize(
    ("provider", "domain", "url", "headers"),
    [
        ("e2b", None, "https://sandbox.e2b.app", {"e2b-sandbox-id": "i1", "e2b-sandbox-port": "49983"}),
        ("e2b", "own.example", "https://49983-i1.own.example", {"e2b-sandbox-id": "i1", "e2b-sandbox-port": "49983"}),
        (
            "ppio",
            None,
            "https://49983-i1-c.sandbox.ppio.cn",
            {"ppio-sandbox-id": "i1-c", "ppio-sandbox-port": "49983"},
        ),
        (
            "ucloud",
            None,
            "https://49983-i1.cn-wlcb.sandbox.ucloudai.com",
            {"e2b-sandbox-id": "i1", "e2b-sandbox-port": "49983"},
        ),
    ],
)
async def test_envd_is_reached_at_each_providers_own_address(
    provider: str, domain: str | None, url: str, headers: dict[str, str]
) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if "andbox-port" not in " ".join(request.headers):
            return httpx.Response(201, json=Server().grant("i1") | {"domain": domain})

        seen.append(request)
        return httpx.Response(200, json={})

    async with Client(provider=provider, api_key="k3y", transport=httpx.MockTransport(handler)) as client:
        sandbox = await client.create()
        await rpc.unary(sandbox, STAT, {}, op="test")

    (request,) = seen
    assert (url, f"/{STAT}") == (str(request.url).removesuffix(f"/{STAT}"), request.url.path)
    assert headers | {"x-access-token": "token-of-i1"} == {
        name: request.headers.get(name) for name in [*headers, "x-access-token"]
    }
    assert "k3y" not in str(request.headers.raw)
    assert ENVD_PORT == 49983


VERBS = ["call", "command", "background", "read", "write", "code", "info", "connect", "create", "list"]


@pytest.mark.parametrize("verb", VERBS)
async def test_cancelled_at_any_step_of_the_loop_a_verb_leaves_nothing(
    both: tuple[Loopback, Sandbox], verb: str
) -> None:
    loopback, sandbox = both
    client = sandbox._client
    begun, ended = envelope({"event": {"start": {"pid": 7}}}), envelope({"event": {"end": {"exited": True}}})
    loopback.on(f"/{START}", [HEAD, chunk(begun), chunk(ended), chunk(end()), DONE])
    loopback.on("/process.Process/SendSignal", [plain({})])
    loopback.on(f"/{STAT}", [plain({})])
    loopback.on("/execute", [HEAD, chunk(b'{"type": "end_of_execution"}\n'), DONE])
    loopback.on("/files", [plain([{"path": "/f", "name": "f"}])])
    loopback.on("/v2/sandboxes", [plain(Server().grant("i1"))])

    async def rows() -> list[SandboxInfo]:
        loopback.on("/v2/sandboxes", [plain([Server().row_of("i1")])])
        return [row async for row in client.list()]

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0)
        yield b"b"

    async def background() -> None:
        async with await sandbox.commands.start("make") as command:
            await command.wait()

    verbs: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "call": lambda: rpc.unary(sandbox, STAT, {}, op="test"),
        "command": lambda: sandbox.commands.run("make"),
        "background": background,
        "code": lambda: sandbox.run_code("1"),
        "read": lambda: sandbox.files.read("f"),
        "write": lambda: sandbox.files.write("f", pieces()),
        "info": lambda: client.info("i1"),
        "connect": lambda: client.connect("i1"),
        "create": client.create,
        "list": rows,
    }
    await verbs[verb]()
    await client.transport._pooled._transport.aclose()

    async with nothing_left(sandbox):
        cancelled = 0
        for steps in range(2000):
            task = asyncio.create_task(verbs[verb]())
            for _ in range(steps):
                await asyncio.sleep(0)
            if task.done():
                break
            task.cancel()
            await asyncio.wait({task})
            cancelled += task.cancelled()
            assert task.cancelled() or task.exception() is None
        await task
    assert cancelled > 10
