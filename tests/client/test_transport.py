from __future__ import annotations

import asyncio
import email.utils
import time
import traceback
from collections.abc import Callable

import httpx
import pytest

from sandbox_tools.client import Client
from sandbox_tools.client.retries import retry_after
from sandbox_tools.client.transport import QUOTED, Call, Transport, translate
from sandbox_tools.errors import (
    APIError,
    AuthenticationError,
    CapacityError,
    ConfigError,
    ConnectError,
    NotFoundError,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    SandboxError,
    ServerError,
    TransportError,
)

FATES = {
    httpx.HTTPError: TransportError,
    httpx.RequestError: TransportError,
    httpx.TransportError: TransportError,
    httpx.TimeoutException: RequestTimeoutError,
    httpx.ConnectTimeout: ConnectError,
    httpx.ReadTimeout: RequestTimeoutError,
    httpx.WriteTimeout: RequestTimeoutError,
    httpx.PoolTimeout: ConnectError,
    httpx.NetworkError: TransportError,
    httpx.ConnectError: ConnectError,
    httpx.ReadError: TransportError,
    httpx.WriteError: TransportError,
    httpx.CloseError: TransportError,
    httpx.ProxyError: ConnectError,
    httpx.UnsupportedProtocol: ConfigError,
    httpx.ProtocolError: TransportError,
    httpx.LocalProtocolError: ConfigError,
    httpx.RemoteProtocolError: TransportError,
    httpx.DecodingError: ProtocolError,
    httpx.TooManyRedirects: ProtocolError,
    httpx.HTTPStatusError: TransportError,
    httpx.InvalidURL: ConfigError,
}


def tree(cls: type[Exception]) -> set[type[Exception]]:
    return {cls}.union(*map(tree, cls.__subclasses__()))


def test_every_exception_of_httpx_has_a_fate() -> None:
    """Walks httpx's own classes, so that a new one fails here instead of escaping to users."""
    foreign = {cls for cls in tree(httpx.HTTPError) | {httpx.InvalidURL} if cls.__module__.startswith("httpx")}

    assert foreign == set(FATES)
    for cls, ours in FATES.items():
        assert ours is type(translate(cls.__new__(cls), op="info", sandbox_id=None))


GET = Call(op="info", method="GET", path="/sandboxes/i1", sandbox_id="i1")
CREATE = Call(op="create", method="POST", path="/sandboxes", body={}, idempotent=False)

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, *, request_timeout: float = 5.0, key: str = "s3cret") -> Transport:
    transport = httpx.MockTransport(handler)
    return Client(provider="e2b", api_key=key, transport=transport, request_timeout=request_timeout).transport


def answers(*steps: int | Exception | httpx.Response) -> tuple[Handler, list[str]]:
    """One step a request, the last one for good."""
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        step = steps[min(len(seen), len(steps) - 1)]
        seen.append(request.method)
        if isinstance(step, Exception):
            raise step

        return step if isinstance(step, httpx.Response) else refusal(step)

    return handler, seen


def refusal(status: int, **more: object) -> httpx.Response:
    headers = more.pop("headers", None)
    return httpx.Response(status, json={"code": status, "message": "because", **more}, headers=headers)


OK = httpx.Response(200, json={})


@pytest.mark.parametrize(
    "failure",
    [
        502,
        503,
        504,
        429,
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("disconnected"),
        httpx.ReadError("cut"),
    ],
    ids=str,
)
async def test_what_may_be_done_twice_is_repeated(failure: int | Exception) -> None:
    handler, seen = answers(failure, failure, OK)

    await client(handler).send(GET)

    assert 3 == len(seen)


@pytest.mark.parametrize("failure", [400, 401, 403, 404, 409, 500, httpx.DecodingError("bad gzip")], ids=str)
async def test_what_would_fail_again_is_not_repeated(failure: int | Exception) -> None:
    handler, seen = answers(failure)

    with pytest.raises(SandboxError):
        await client(handler).send(GET)
    assert 1 == len(seen)


@pytest.mark.parametrize(
    "failure",
    [httpx.ConnectError("refused"), 429, refusal(503, error_code="sandbox_capacity_unavailable")],
    ids=["connect", "429", "no capacity"],
)
async def test_a_create_is_repeated_where_it_certainly_did_not_happen(
    failure: int | Exception | httpx.Response,
) -> None:
    handler, seen = answers(failure, OK)

    await client(handler).send(CREATE)

    assert 2 == len(seen)


@pytest.mark.parametrize(
    "failure",
    [502, 503, 504, httpx.RemoteProtocolError("disconnected"), httpx.ReadError("cut"), httpx.WriteError("cut")],
    ids=str,
)
async def test_a_create_that_may_have_happened_is_not_repeated(failure: int | Exception) -> None:
    """Unknown never becomes a second sandbox."""
    handler, seen = answers(failure)

    with pytest.raises(SandboxError) as caught:
        await client(handler).send(CREATE)
    assert 1 == len(seen)
    assert not isinstance(caught.value, NotFoundError)


async def test_repeats_end_with_the_servers_own_error() -> None:
    handler, seen = answers(refusal(503, error_code="sandbox_no_compatible_node", headers={"x-request-id": "r7"}))

    with pytest.raises(CapacityError) as caught:
        await client(handler).send(GET)
    error = caught.value
    assert 4 == len(seen)
    assert (503, "sandbox_no_compatible_node", "r7") == (error.status_code, error.error_code, error.request_id)
    assert ("info", "i1") == (error.op, error.sandbox_id)


async def test_a_wait_longer_than_the_deadline_is_left_to_the_caller() -> None:
    handler, seen = answers(refusal(429, headers={"retry-after": "60"}))

    with pytest.raises(RateLimitError) as caught:
        await client(handler).send(GET)
    assert (1, 60.0) == (len(seen), caught.value.retry_after)


async def test_a_server_that_says_not_to_is_not_asked_again() -> None:
    for call in (GET, CREATE):
        handler, seen = answers(refusal(429, headers={"Should-Retry": "false"}))
        with pytest.raises(RateLimitError) as caught:
            await client(handler).send(call)
        assert (1, False) == (len(seen), caught.value.retryable)


async def test_a_server_that_says_so_is_asked_again_unless_it_could_make_a_second_one() -> None:
    handler, seen = answers(refusal(500, headers={"Should-Retry": "true"}), OK)
    await client(handler).send(GET)
    assert 2 == len(seen)

    handler, seen = answers(refusal(500, headers={"Should-Retry": "true"}))
    with pytest.raises(ServerError) as caught:
        await client(handler).send(CREATE)
    assert (1, None) == (len(seen), caught.value.retryable)


async def test_what_a_full_server_says_without_its_slug_leaves_open_whether_it_created() -> None:
    handler, _ = answers(503)
    with pytest.raises(CapacityError) as caught:
        await client(handler).send(CREATE)
    assert caught.value.retryable is None

    handler, _ = answers(refusal(503, error_code="sandbox_capacity_unavailable"))
    with pytest.raises(CapacityError) as caught:
        await client(handler).send(CREATE)
    assert caught.value.retryable is True


async def test_a_deadline_that_ends_a_wait_leaves_the_servers_own_answer() -> None:
    """Not a timeout, which would say that it may have happened."""
    handler, seen = answers(refusal(429, headers={"retry-after": "0.25"}))

    with pytest.raises(RateLimitError):
        await client(handler, request_timeout=0.3).send(CREATE)
    assert len(seen) <= 2


async def test_no_answer_in_time_is_its_own_error_and_says_that_it_may_have_happened() -> None:
    never = asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        await never.wait()
        return OK

    with pytest.raises(RequestTimeoutError) as caught:
        await client(handler, request_timeout=0.05).send(GET)  # type: ignore[arg-type]
    assert caught.value.retryable is None
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("status", [302, 400, 404, 409, 418])
async def test_a_refusal_in_foreign_words_is_no_answer_of_the_protocol(status: int) -> None:
    """A wrong URL's "404 page" must not be taken for a sandbox that is gone."""
    handler, _ = answers(httpx.Response(status, html="<h1>nginx</h1>"))

    with pytest.raises(ProtocolError):
        await client(handler).send(GET)


@pytest.mark.parametrize(
    ("status", "cls"), [(401, AuthenticationError), (502, ServerError), (503, CapacityError), (429, RateLimitError)]
)
async def test_what_a_proxy_in_between_may_say_is_believed_by_its_status(status: int, cls: type[APIError]) -> None:
    handler, _ = answers(httpx.Response(status, html="<h1>proxy</h1>"))

    with pytest.raises(cls):
        await client(handler).send(GET)


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
@pytest.mark.parametrize("plain", [False, True])
async def test_a_server_that_quotes_secrets_cannot_put_them_into_errors_or_logs(
    status: int, plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither whole nor, where what it says is too long, in part."""
    key, token, traffic = "k3y'\"-of-the-client", "t0ken-of-the-sandbox", "tr4ffic-token"
    words = f"{key} {token} {traffic} " + "x" * (QUOTED - 50) + key
    caplog.set_level("DEBUG")

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/connect"):
            grant = {"templateID": "t", "sandboxID": "i1", "envdAccessToken": token, "trafficAccessToken": traffic}
            return httpx.Response(200, json=grant)
        if plain:
            return httpx.Response(status, text=words, headers={"x-request-id": token})
        problem = {"code": status, "message": words, "error_code": key}
        return httpx.Response(status, json=problem, headers={"x-request-id": token})

    transport = httpx.MockTransport(handler)
    async with Client(provider="e2b", api_key=key, transport=transport, request_timeout=0.3) as owner:
        sandbox = await owner.connect("i1")
        said = repr(sandbox) + repr(owner) + repr(sandbox._grant) + repr(owner.address) + repr(owner.transport)
        for call in (owner.info("i1"), owner.pause("i1"), owner.create(env={"A": "1"}), owner.fork("i1")):
            with pytest.raises(SandboxError) as caught:
                await call
            lines = traceback.format_exception(caught.value)
            said += "".join(lines) + repr(caught.value) + repr(vars(caught.value))
    said += caplog.text

    for secret in (key, token, traffic):
        assert secret not in said
        assert secret[: len(secret) // 2] not in said


async def test_a_malformed_answer_that_quotes_secrets_is_not_quoted_in_turn() -> None:
    """Over a real connection: the library's own error says what it has received."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + head.partition(b"\r\n")[2].replace(b": ", b" "))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with Client(provider="e2b", api_key="s3cret", api_url=url) as owner:
        with pytest.raises(TransportError) as caught:
            await owner.info("i1")
    assert "illegal header line" in str(caught.value)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    server.close()


async def test_the_key_travels_in_its_header() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert "s3cret" == request.headers["X-API-KEY"]
        return OK

    await client(handler).send(GET)


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert 3.0 == retry_after("3")
    assert 0.0 == retry_after("-3")
    assert retry_after("soon") is None
    assert retry_after(None) is None
    in_an_hour = retry_after(email.utils.formatdate(time.time() + 3600, usegmt=True))
    assert in_an_hour is not None
    assert 3500 < in_an_hour <= 3600
