"""One request: its deadline, its repeats, and the one place where foreign failures become this package's errors."""

from __future__ import annotations

import asyncio
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from sandbox_tools.client import retries
from sandbox_tools.client.dialects import Address
from sandbox_tools.client.local import LocalEngine
from sandbox_tools.client.sockets import whole
from sandbox_tools.errors import (
    APIError,
    ConfigError,
    ConnectError,
    ProtocolError,
    RequestTimeoutError,
    SandboxError,
    SandboxNotFoundError,
    TransportError,
    error_for_status,
)
from sandbox_tools.models import ErrorBody

T = TypeVar("T")

LONG_REQUEST = 600.0
"""Seconds for create, connect and pause, which may move gigabytes, where `request_timeout` is shorter."""

CONNECT_TIMEOUT = 10.0
"""Seconds to establish one connection."""

SECRETS = 4096
"""How many tokens are remembered, to keep them out of messages; those unused for longest are forgotten first."""

QUOTED = 500
"""Characters of a server's own words that a message repeats."""

# Below the 5 s after which common servers close an idle connection, so that none is used while it is being closed.
KEEPALIVE_EXPIRY = 2.0

# The first that fits. `tests/client/test_transport.py` walks httpx's own tree and names each class's fate.
_TRANSLATIONS: dict[type[SandboxError], tuple[type[Exception], ...]] = {
    ConnectError: (httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ConnectError, httpx.ProxyError),
    RequestTimeoutError: (httpx.TimeoutException,),
    ConfigError: (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError),
    ProtocolError: (httpx.DecodingError, httpx.TooManyRedirects),
    TransportError: (httpx.HTTPError,),
}

FOREIGN = (httpx.HTTPError, httpx.InvalidURL)

_FATES: dict[type[SandboxError], str] = {
    ConnectError: "The server could not be reached. Check the address and the network, and try again.",
    RequestTimeoutError: "No answer came in time, so it may have happened. Look at the sandbox's state first.",
    ConfigError: "The request cannot be sent like this. Check the API URL and the domain.",
    ProtocolError: "The answer is not of the protocol. Check the API URL.",
    TransportError: "The connection broke, so it may have happened. Look at the sandbox's state first.",
}

_ADVICE: dict[int, str] = {
    400: "Correct the argument it names.",
    401: "Check the API key.",
    403: "Check what this API key may do.",
    404: "It was killed, or its time ran out, or the id is wrong.",
    409: "Wait for the change in progress, or look at its state.",
    429: "Wait before you try again.",
    503: "There is no room now; try again later.",
}

IDEMPOTENCY_KEY = "Idempotency-Key"
"""The header by which a server that knows it tells a repeated create from a second one."""

REQUEST_ID_HEADERS = ("x-request-id", "request-id", "x-trace-id")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to the control plane."""

    op: str
    method: str
    path: str
    sandbox_id: str | None = None
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = True
    """Whether doing it twice is the same as once. If not, it is repeated only where it certainly did not happen, or
    where the server is sent an `Idempotency-Key`."""
    believed: bool = True
    """Whether a 404 says that there is no such sandbox."""
    deadline: float | None = None
    """Seconds for the call with all its repeats. None: the client's `request_timeout`."""


class Transport:
    """Sends requests for one `Client`; owns its connections.

    Args:
        request_timeout: Seconds for one call with all its repeats, unless the call says otherwise.
        engine: The local engine to start when it is not there. None: somebody else runs the server.
        inner: Replaces the network, for tests.
    """

    def __init__(
        self,
        address: Address,
        *,
        request_timeout: float,
        engine: LocalEngine | None = None,
        inner: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._address = address
        self.request_timeout = request_timeout
        self._engine = engine
        self._secrets: dict[str, None] = {}
        self.socket = engine.socket if engine else None
        network = not (engine or inner)
        # No certificates are read for a Unix socket: that takes longer than most calls on it.
        verify = network and httpx.create_ssl_context()

        def http(kept: int) -> httpx.AsyncClient:
            # No limit to connections: a stream may be open for hours, and must not make others wait.
            limits = httpx.Limits(max_keepalive_connections=kept, keepalive_expiry=KEEPALIVE_EXPIRY)
            uds = str(self.socket) if self.socket else None
            return httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=uds, limits=limits, verify=False) if uds else inner,
                verify=verify,
                limits=limits,
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
                # A URL that somebody named is meant literally; a provider's own may be behind the environment's proxy.
                trust_env=network and not address.url_named,
                headers={"User-Agent": "sandbox-tools"},
            )

        self._pooled = http(kept=20)
        # For what is lost with a used connection: a create, which nobody could tell from one that arrived where the
        # server is just closing that; and all that is sent to a sandbox right after its resume.
        self._fresh = http(kept=0)

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._pooled.aclose()
        await self._fresh.aclose()

    async def send(self, call: Call) -> httpx.Response:
        """Sends one call to the control plane, repeats it where that is safe, and gives the 2xx answer.

        Its `extensions["attempts"]` says how often it was sent.

        Raises:
            TransportError: No usable answer came.
            APIError: The server said no.
        """
        seconds = self.request_timeout if call.deadline is None else call.deadline
        twice = call.idempotent or IDEMPOTENCY_KEY in call.headers
        again = retries.safe_to_repeat if twice else retries.certainly_not_done
        http = self._pooled if call.idempotent else self._fresh
        headers = {**call.headers, "X-API-KEY": self._address.api_key} if self._address.api_key else call.headers
        url = self._address.api_url + call.path
        if call.params:  # Encoded as httpx does it, which would take the URL apart once more.
            url += f"?{urllib.parse.urlencode(call.params)}"
        request = http.build_request(call.method, url, json=call.body, headers=headers)
        attempts, doubt = 0, False
        failure: SandboxError | None = None

        async def once() -> httpx.Response:
            nonlocal attempts, doubt, failure
            attempts, failure = attempts + 1, None
            try:
                response = await whole(http, request)
                if response.is_success:
                    response.extensions["attempts"] = attempts
                    return response

                failure = self.refusal(response, call)
            except FOREIGN as error:
                failure = self.translated(error, call.op, call.sandbox_id)

            # What one attempt may have done, no later one's failure undoes.
            doubt = doubt or retries.may_have_happened(failure)
            if doubt and not call.idempotent and failure.retryable:
                failure.retryable = None

            raise failure

        async def repeated() -> httpx.Response:
            end = time.monotonic() + seconds
            try:
                async with in_time(call.op, seconds, call.sandbox_id):
                    return await retries.repeat(once, lambda e: again(e) and time.monotonic() + retries.wait(e) < end)
            except RequestTimeoutError as error:
                if failure is not None:  # It came while the next attempt was waited for.
                    raise failure from error

                raise

        return await self._with_engine(repeated)

    async def open(
        self, op: str, sandbox_id: str, method: str, url: str, *, fresh: bool, idempotent: bool = False, **content: Any
    ) -> httpx.Response:
        """Sends one request to a sandbox; the caller reads the answer and closes it.

        Args:
            fresh: Whether it gets a connection of its own. False: one that was used less than `KEEPALIVE_EXPIRY`
                seconds ago will do, if it still stands.
            idempotent: Whether it may be done twice. If not, it is sent again only if no connection came about.
            content: Headers, parameters and the body, as httpx's `build_request` takes them.
        """
        http = self._fresh if fresh else self._pooled
        request = http.build_request(method, url, **content)

        async def once() -> httpx.Response:
            try:
                return await http.send(request, stream=True)
            except FOREIGN as error:
                failure = self.translated(error, op, sandbox_id)

            raise failure

        again = retries.safe_to_repeat if idempotent else lambda error: isinstance(error, ConnectError)
        return await self._with_engine(lambda: retries.repeat(once, again))

    def refusal(self, response: httpx.Response, call: Call) -> SandboxError:
        """The error for an answer of the control plane that is not 2xx."""
        status, about = response.status_code, call.sandbox_id
        try:
            body = ErrorBody.model_validate_json(response.content)
        except ValidationError:
            # A proxy in between may fail in its own words, but only the protocol's own "not found" may be believed:
            # a new sandbox could be made on its strength.
            if status < 500 and status not in (401, 403, 429):
                said = f"status {status} and {self.quoted(response.text)!r}"
                msg = f"`{call.op}` was answered with {said}, which is not of the protocol. Check the API URL."
                return ProtocolError(msg, op=call.op, sandbox_id=about)

            body = ErrorBody(code=status, message=response.text)

        advice = _ADVICE.get(status, "Try again later." if status >= 500 else "Check the arguments.")
        if status == 404 and about is None:
            advice = "Check the template or id that it was given."

        msg = f"`{call.op}` was refused with status {status}: {self.quoted(body.message)!r}. {advice}"
        gone = status == 404 and about is not None and call.believed
        cls = SandboxNotFoundError if gone else error_for_status(status)
        error = self.refused(cls, msg, response, body.error_code, call.op, about)
        should = response.headers.get("should-retry", "").strip().lower()
        error.retryable = {"true": True, "false": False}.get(should, error.retryable)
        return error

    def refused(
        self, cls: type[APIError], msg: str, response: httpx.Response, slug: object, op: str, sandbox_id: str | None
    ) -> APIError:
        """An error with all that an answer says of it."""
        named = next((response.headers[name] for name in REQUEST_ID_HEADERS if name in response.headers), None)
        return cls(
            msg,
            status_code=response.status_code,
            error_code=self.quoted(slug) if slug and isinstance(slug, str) else None,
            request_id=self.quoted(named) if named else None,
            retry_after=retries.retry_after(response.headers.get("retry-after")),
            op=op,
            sandbox_id=sandbox_id,
        )

    def keep_secret(self, *tokens: str | None) -> None:
        """Have `quoted` leave these out."""
        for token in filter(None, tokens):
            self._secrets.pop(token, None)
            self._secrets[token] = None
        while len(self._secrets) > SECRETS:
            del self._secrets[next(iter(self._secrets))]

    def quoted(self, text: str) -> str:
        """The beginning of a server's own words, without the key and the tokens."""
        text = text[: 16 * QUOTED]
        # Before it is cut for good, which might leave half a secret.
        for secret in filter(None, (self._address.api_key, *self._secrets)):
            text = text.replace(secret, "***")

        return text[:QUOTED]

    def translated(self, error: Exception, op: str, sandbox_id: str | None) -> SandboxError:
        """As `translate`, with the cause, and without secrets: the library quotes a malformed answer."""
        if (said := self.quoted(str(error))) != str(error):
            error = type(error)(said)

        failure = translate(error, op=op, sandbox_id=sandbox_id)
        failure.__cause__ = error
        return failure

    async def ready(self) -> None:
        """Returns once the server can be asked, which is at once unless it is a local engine that must be started."""
        if self._engine:
            await self._engine.ready()

    async def _with_engine(self, attempt: Callable[[], Awaitable[T]]) -> T:
        await self.ready()
        try:
            return await attempt()
        except ConnectError:
            if self._engine is None:
                raise

            # An engine with nothing to do exits; the request never left, so the next one may have it.
            self._engine.lost()
            await self._engine.ready()
            return await attempt()


@asynccontextmanager
async def in_time(op: str, seconds: float, sandbox_id: str | None = None) -> AsyncIterator[None]:
    """Raises a `RequestTimeoutError` in here after so many seconds."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise

        msg = f"`{op}` got no answer within {max(seconds, 0):g} s, so it may have happened. Look at the sandbox first."
        raise RequestTimeoutError(msg, op=op, sandbox_id=sandbox_id) from error


def translate(error: Exception, *, op: str, sandbox_id: str | None) -> SandboxError:
    """What one of httpx's exceptions means to us. Its text is left out where it could quote a header."""
    cls = next(ours for ours, theirs in _TRANSLATIONS.items() if isinstance(error, theirs))
    detail = "" if isinstance(error, httpx.LocalProtocolError) else f" ({error})" if str(error) else ""
    return cls(f"`{op}` failed: {type(error).__name__}{detail}. {_FATES[cls]}", op=op, sandbox_id=sandbox_id)
