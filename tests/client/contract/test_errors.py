"""Each refusal and failure of PROTOCOL.md 2, 3 and 5, and of appendix B, becomes the right class, with what it says."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sandbox_tools.errors import (
    AccessDeniedError,
    APIError,
    AuthenticationError,
    CapacityError,
    ConflictError,
    ConnectError,
    ExecutionTimeoutError,
    NotFoundError,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxNotFoundError,
    SandboxStateError,
    ServerError,
    TransportError,
)
from tests.client.contract.ours import CALLS, Call
from tests.client.contract.places import PLACES
from tests.client.contract.recorder import Answer, Recorder, refused, said
from tests.client.contract.service import (
    ID,
    KEY,
    PROCESS,
    SECRETS,
    STARTED,
    TOKEN,
    TRAFFIC,
    executed,
    paused,
    streamed,
    unknown,
    well,
)

SPOKEN = f"{TOKEN} {TRAFFIC}"
"""What a careless sandbox quotes in its errors; a careless control plane quotes the key."""

API: Mapping[str, tuple[str, str]] = {
    "create": ("POST", "/v2/sandboxes"),
    "connect": ("POST", f"/v2/sandboxes/{ID}/connect"),
    "pause": ("POST", f"/sandboxes/{ID}/pause"),
    "kill": ("DELETE", f"/sandboxes/{ID}"),
    "info": ("GET", f"/sandboxes/{ID}"),
    "list": ("GET", "/v2/sandboxes"),
    "set_timeout": ("POST", f"/sandboxes/{ID}/timeout"),
    "metrics": ("GET", f"/sandboxes/{ID}/metrics"),
    "snapshot": ("POST", f"/sandboxes/{ID}/snapshots"),
    "list_snapshots": ("GET", "/snapshots"),
    "delete_snapshot": ("DELETE", "/templates/team%2Fsnap%3Adefault"),
    "fork": ("POST", f"/sandboxes/{ID}/fork"),
}
"""Where the verbs of the control plane go."""

INSIDE: Mapping[str, tuple[str, str]] = {
    "run_code": ("POST", "/execute"),
    "create_context": ("POST", "/contexts"),
    "list_contexts": ("GET", "/contexts"),
    "restart_context": ("POST", "/contexts/c1/restart"),
    "remove_context": ("DELETE", "/contexts/c1"),
    "commands.run": ("POST", "/process.Process/Start"),
    "commands.connect": ("POST", "/process.Process/Connect"),
    "commands.list": ("POST", "/process.Process/List"),
    "commands.kill": ("POST", "/process.Process/SendSignal"),
    "send_stdin": ("POST", "/process.Process/SendInput"),
    "close_stdin": ("POST", "/process.Process/CloseStdin"),
    "files.read": ("GET", "/files"),
    "files.write": ("POST", "/files"),
    "files.list": ("POST", "/filesystem.Filesystem/ListDir"),
    "files.info": ("POST", "/filesystem.Filesystem/Stat"),
    "files.make_dir": ("POST", "/filesystem.Filesystem/MakeDir"),
    "files.move": ("POST", "/filesystem.Filesystem/Move"),
    "files.remove": ("POST", "/filesystem.Filesystem/Remove"),
}
"""Where the verbs of a sandbox go."""

ONCE = {"create", "snapshot", "fork"}
"""What is never sent again unless it certainly did not happen."""

SOON = "0.001"
"""Seconds to wait; short, so that repeats are quick."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One verb, what it is answered, and what must come of it."""

    verb: str
    answer: Answer
    """Each time."""
    error: type[SandboxError]
    retryable: bool | None = False
    says: str = ""
    """Words of the message, in any case: what happened, or what to do next."""
    never: str = ""
    """Words that would mislead."""
    sent: int = 1
    """How often. 0: what only reads may be sent again, and others not."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the error."""
    info: Answer | None = None
    """What `info` says when it is asked why. None: that the sandbox runs."""
    named: str = ""
    """What tells it from other cases of this verb and error."""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.verb, self.named, self.error.__name__)))


def generic() -> Iterator[Case]:
    """What any verb of the control plane may be answered."""
    for verb in API:
        again = 1 if verb in ONCE - {"create"} else 4  # create has an `Idempotency-Key`, which this server keeps to
        # What came instead of a grant does not say that no sandbox will come of it.
        odd = None if verb == "create" else False
        rows: list[tuple[int, type[SandboxError], bool | None, int, str]] = [
            (400, APIError, False, 1, "argument"),
            (401, AuthenticationError, False, 1, "key"),
            (403, AccessDeniedError, False, 1, "key"),
            (422, APIError, False, 1, "argument"),
            (429, RateLimitError, True, 4, "wait"),
            (500, ServerError, None, 1, "try again later"),
            (502, ServerError, None, again, "try again later"),
            (504, ServerError, None, again, "try again later"),
        ]
        for status, error, retryable, sent, says in rows:
            answer = refused(status, f"because of {KEY}", error_code="a_slug", x_request_id="r-1", retry_after=SOON)
            more = {"status_code": status, "error_code": "a_slug", "request_id": "r-1", "retry_after": 0.001}
            yield Case(
                verb=verb,
                answer=answer,
                error=error,
                retryable=retryable,
                says=says,
                sent=sent,
                more=more,
                named=str(status),
            )

        capacity = refused(503, KEY, error_code="sandbox_capacity_unavailable", retry_after=SOON)
        yield Case(
            verb=verb,
            answer=capacity,
            error=CapacityError,
            retryable=True,
            says="no room",
            sent=4,
            more={"status_code": 503, "error_code": "sandbox_capacity_unavailable", "retry_after": 0.001},
            named="503",
        )
        patience = refused(429, "Rate limit exceeded", retry_after="7200")
        yield Case(
            verb=verb,
            answer=patience,
            error=RateLimitError,
            retryable=True,
            says="wait",
            more={"retry_after": 7200.0},
            named="429 for longer than its deadline",
        )
        page = Answer(status=404, body=f"<h1>nginx {KEY}</h1>".encode(), headers={"content-type": "text/html"})
        yield Case(
            verb=verb, answer=page, error=ProtocolError, retryable=odd, says="check the api url", named="404 in HTML"
        )
        wordless = said(404, {"detail": KEY})
        yield Case(
            verb=verb,
            answer=wordless,
            error=ProtocolError,
            retryable=odd,
            says="check the api url",
            named="404 in other words",
        )
        bad_gateway = Answer(status=502, body=f"<h1>{KEY}</h1>".encode(), headers={"retry-after": SOON})
        yield Case(verb=verb, answer=bad_gateway, error=ServerError, retryable=None, sent=again, named="502 in HTML")
        redirect = Answer(status=302, headers={"location": "https://elsewhere.example/"})
        yield Case(
            verb=verb, answer=redirect, error=ProtocolError, retryable=odd, says="check the api url", named="a redirect"
        )
        yield Case(
            verb=verb,
            answer=Answer(ending="deaf"),
            error=TransportError,
            retryable=None,
            says="may have happened",
            sent=again,
            named="no answer but a reset",
        )
        if verb not in ("pause", "kill", "set_timeout", "delete_snapshot"):
            broken = Answer(status=200, body=b'{"sandboxID": "i', ending="cut")
            yield Case(
                verb=verb,
                answer=broken,
                error=TransportError,
                retryable=None,
                says="may have happened",
                sent=again,
                named="half an answer",
            )
            shapeless = said(200, {"envdAccessToken": TOKEN, "sandboxID": 7})
            yield Case(
                verb=verb,
                answer=shapeless,
                error=ProtocolError,
                retryable=odd,
                says="not of the protocol",
                named="no grant",
            )


CONTROL = (
    *generic(),
    Case(
        verb="metrics",
        answer=said(200, [1]),
        error=ProtocolError,
        says="not of the protocol",
        named="rows that are none",
    ),
    *(
        Case(
            verb=verb,
            answer=unknown(),
            error=SandboxNotFoundError,
            says="the id is wrong",
            more={"status_code": 404},
            named="404",
        )
        for verb in ("connect", "info", "pause")
    ),
    *(
        Case(
            verb=verb,
            answer=unknown(),
            info=info,
            error=error,
            retryable=error.retryable,
            says=says,
            named=f"404, and info says {named}",
        )
        for verb in ("set_timeout", "metrics", "snapshot", "fork")
        for named, info, error, says in (
            ("the same", unknown(), SandboxNotFoundError, "the id is wrong"),
            ("paused", paused(), SandboxStateError, "connect to it first"),
            ("running", None, NotFoundError, "the id is wrong"),
            ("nothing", Answer(ending="deaf"), TransportError, "may have happened"),
        )
    ),
    Case(
        verb="pause",
        answer=refused(409, f"Sandbox \"{ID}\" cannot be paused while in 'snapshotting' state"),
        error=ConflictError,
        says="state",
        more={"status_code": 409},
    ),
    *(
        Case(
            verb="pause",
            answer=refused(409, "state"),
            info=info,
            error=error,
            named=f"409, and info says {named}",
            retryable=error.retryable,
        )
        for named, info, error in (
            ("that it is gone", unknown(), SandboxNotFoundError),
            ("nothing", Answer(ending="deaf"), TransportError),
        )
    ),
    Case(
        verb="connect",
        answer=refused(409, "The sandbox is being killed"),
        error=ConflictError,
        says="state",
        more={"status_code": 409},
    ),
    Case(
        verb="connect",
        answer=refused(409, "Guest", error_code="sandbox_snapshot_guest_agent_unresponsive"),
        error=ConflictError,
        more={"error_code": "sandbox_snapshot_guest_agent_unresponsive"},
        named="a guest that does not answer",
    ),
    Case(
        verb="set_timeout",
        answer=refused(409, "The sandbox is being paused"),
        error=ConflictError,
        says="state",
        more={"status_code": 409},
    ),
    Case(
        verb="set_timeout",
        answer=refused(400, "Max instance length exceeded"),
        error=APIError,
        says="max instance length",
        more={"status_code": 400},
        named="longer than the plan allows",
    ),
    Case(
        verb="create",
        answer=refused(404, "Template 'nope' not found"),
        error=NotFoundError,
        says="template",
        never="killed",
        more={"status_code": 404},
        named="an unknown template",
    ),
    Case(
        verb="list",
        answer=refused(400, "Invalid next token"),
        error=APIError,
        says="invalid next token",
        named="400 token",
    ),
)

NOT_FOUND = {"sandboxId": ID, "message": f"The sandbox was not found {SPOKEN}", "code": 502}
CLOSED = {
    "sandboxId": ID,
    "message": f"The sandbox is running but port is not open {SPOKEN}",
    "port": 49999,
    "code": 502,
}


def plain(status: int, text: str, **headers: str) -> Answer:
    """As the interpreter words its errors."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status=status, body=text.encode(), headers={"content-type": "text/plain", **named})


BEGUN = (
    {"type": "number_of_executions", "execution_count": 1},
    {"type": "stdout", "text": "begun", "timestamp": STARTED},
)

CODE = (
    Case(
        verb="run_code in a context",
        answer=plain(404, f"Context c1 not found {SPOKEN}"),
        error=NotFoundError,
        says="which itself is there",
    ),
    Case(verb="run_code", answer=plain(404, f"404 page not found {SPOKEN}"), error=ProtocolError, says="domain"),
    Case(verb="run_code", answer=plain(400, f"missing header {SPOKEN}"), error=APIError, more={"status_code": 400}),
    Case(
        verb="run_code",
        answer=said(401, {"code": 401, "message": f"unauthorized access {SPOKEN}"}, x_request_id="r-2"),
        error=AuthenticationError,
        more={"status_code": 401, "request_id": "r-2"},
    ),
    Case(
        verb="run_code",
        answer=said(403, {"sandboxId": ID, "message": f"traffic token {SPOKEN}", "code": 403}),
        error=AccessDeniedError,
        more={"status_code": 403},
    ),
    Case(
        verb="run_code",
        answer=said(409, {"code": 409, "message": f"The sandbox is still transitioning. {SPOKEN}"}),
        error=SandboxBusyError,
        retryable=True,
        says="try again in a moment",
    ),
    Case(
        verb="run_code",
        answer=plain(429, f"too many connections {SPOKEN}", retry_after="3"),
        error=RateLimitError,
        retryable=True,
        more={"status_code": 429, "retry_after": 3.0},
    ),
    Case(verb="run_code", answer=plain(500, f"no kernel {SPOKEN}"), error=ServerError, retryable=None),
    Case(verb="run_code", answer=plain(503, f"busy {SPOKEN}"), error=CapacityError, retryable=None),
    Case(
        verb="run_code",
        answer=said(502, NOT_FOUND),
        info=unknown(),
        error=SandboxExpiredError,
        says="create a new one",
        named="502 gone",
    ),
    Case(
        verb="run_code",
        answer=said(502, NOT_FOUND),
        info=paused(),
        error=SandboxStateError,
        says="resume it",
        named="502 paused",
    ),
    Case(
        verb="run_code",
        answer=said(502, NOT_FOUND),
        error=TransportError,
        retryable=True,
        says="did not begin",
        named="502 although it runs",
    ),
    Case(
        verb="run_code",
        answer=said(502, CLOSED),
        error=ServerError,
        retryable=None,
        says="port is not open",
        named="502 port",
    ),
    *(
        Case(verb="run_code", answer=answer, info=info, error=error, retryable=retryable, says=says, named=named)
        for named, answer in (
            ("cut", executed(*BEGUN, ending="cut")),
            ("cut before anything came", Answer(ending="deaf")),
        )
        for info, error, retryable, says in (
            (None, TransportError, None, "may have happened"),
            (unknown(), SandboxExpiredError, False, "create a new one"),
            (paused(), SandboxStateError, False, "resume it"),
        )
    ),
    Case(verb="run_code", answer=executed(*BEGUN), error=ProtocolError, says="ended before the code did"),
    Case(
        verb="run_code",
        answer=executed(*BEGUN),
        info=unknown(),
        error=SandboxExpiredError,
        says="create a new one",
        named="an end without the last line",
    ),
    Case(verb="run_code", answer=Answer(body=b"<html>\n"), error=ProtocolError, says="not an event"),
    Case(
        verb="run_code",
        answer=Answer(body=b'{"no": "type"}\n'),
        error=ProtocolError,
        says="not an event",
        named="typeless",
    ),
)


def word(status: int, code: str, **headers: str) -> Answer:
    """As envd words an error of one call."""
    return said(status, {"code": code, "message": f"because {SPOKEN}"}, **headers)


# By Connect's code: the HTTP status beside it, and what it is to become.
CODES: Mapping[str, tuple[int, type[SandboxError], bool | None]] = {
    "invalid_argument": (400, APIError, False),
    "failed_precondition": (400, APIError, False),
    "unauthenticated": (401, AuthenticationError, False),
    "permission_denied": (403, AccessDeniedError, False),
    "not_found": (404, NotFoundError, False),
    "already_exists": (409, ConflictError, False),
    "resource_exhausted": (429, RateLimitError, True),
    "internal": (500, ServerError, None),
    "unknown": (500, ServerError, None),
    "unimplemented": (501, ServerError, None),
    "unavailable": (503, TransportError, None),
    "canceled": (499, TransportError, None),
}


def envd() -> Iterator[Case]:
    """What a daemon that is called may answer."""
    for code, (status, error, retryable) in CODES.items():
        more = {"error_code": code} if issubclass(error, APIError) else {}
        for verb in ("commands.run", "commands.list", "send_stdin", "close_stdin", "files.move", "files.write"):
            yield Case(verb=verb, answer=word(status, code), error=error, retryable=retryable, more=more, named=code)

        ending = streamed(end={"error": {"code": code, "message": f"because {SPOKEN}"}})
        yield Case(
            verb="commands.run",
            answer=ending,
            error=error,
            retryable=retryable,
            more=more,
            named=f"{code} at the stream's end",
        )
        if error is TransportError:
            for info, cls in ((unknown(), SandboxExpiredError), (paused(), SandboxStateError)):
                yield Case(verb="commands.run", answer=ending, info=info, error=cls, named=f"{code}, and why")

    for verb in INSIDE:
        if verb == "run_code":
            continue

        gone = said(502, NOT_FOUND)
        yield Case(
            verb=verb, answer=gone, info=unknown(), error=SandboxExpiredError, says="create a new one", named="502"
        )
        yield Case(verb=verb, answer=gone, info=paused(), error=SandboxStateError, says="resume it", named="502")
        yield Case(verb=verb, answer=gone, error=TransportError, retryable=True, says="did not begin", named="502")
        yield Case(
            verb=verb, answer=Answer(ending="deaf"), info=unknown(), error=SandboxExpiredError, named="deaf", sent=0
        )
        page = plain(404, f"404 page not found {SPOKEN}")
        yield Case(verb=verb, answer=page, error=ProtocolError, says="domain", named="404 in other words")

    for verb in ("send_stdin", "close_stdin", "commands.kill", "files.move"):
        # Nobody knows whether it was done, and what was put in must not be put in again.
        yield Case(
            verb=verb, answer=Answer(ending="deaf"), error=TransportError, retryable=None, says="may have happened"
        )

    begun = streamed(*PROCESS[:2], ending="cut")
    for info, cls, retryable in (
        (None, TransportError, None),
        (unknown(), SandboxExpiredError, False),
        (paused(), SandboxStateError, False),
    ):
        yield Case(verb="commands.run", answer=begun, info=info, error=cls, retryable=retryable, named="cut")

    whole = Answer(body=streamed(*PROCESS[:2], ending="cut").body, headers={"content-type": "application/connect+json"})
    yield Case(
        verb="commands.run", answer=whole, error=ProtocolError, says="ended before", named="an end without a word"
    )
    for verb, status, text, cls in (
        ("files.read", 404, "path '/a' does not exist", NotFoundError),
        ("files.read", 400, "path '/a' is a directory", APIError),
        ("files.read", 401, "error looking up user 'x'", AuthenticationError),
        ("files.write", 400, "path '/a' is a directory", APIError),
        ("files.write", 401, "invalid signature", AuthenticationError),
        ("files.write", 507, "not enough disk space", ServerError),
    ):
        yield Case(
            verb=verb,
            answer=said(status, {"code": status, "message": f"{text} {SPOKEN}"}),
            error=cls,
            retryable=cls.retryable,
            says=text,
            more={"status_code": status},
            named=str(status),
        )


@pytest.mark.parametrize("case", [*CONTROL, *CODE, *envd()], ids=str)
async def test_each_failure_has_its_class_and_says_what_to_do(
    case: Case, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await _fails(case, CALLS[case.verb], recorder, state, monkeypatch, caplog)


async def _fails(
    case: Case,
    call: Call,
    recorder: Recorder,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("E2B_API_KEY", KEY)
    well(recorder, trafficAccessToken=TRAFFIC)
    method, path = {**API, **INSIDE}[case.verb.partition(" ")[0]]
    # A create that may have happened is looked for as long as any request may take.
    limit = {"request_timeout": 0.5} if case.verb == "create" else {}
    async with PLACES["e2b"].client(recorder, state, **limit) as client:
        sandbox = await client.create()
        recorder.requests.clear()
        caplog.clear()
        if case.info:
            recorder.on("GET", f"/sandboxes/{ID}", case.info)

        recorder.on(method, path, case.answer)
        with pytest.raises(SandboxError) as caught:
            async with asyncio.timeout(20):
                await call(client, sandbox)

    error = caught.value
    assert case.error is type(error), error
    assert case.retryable is error.retryable
    assert case.says in str(error).lower()
    assert not case.never or case.never not in str(error).lower()
    assert str(error).endswith((".", ".'", '."'))
    assert dict(case.more) == {name: getattr(error, name) for name in case.more}
    assert not case.sent or case.sent == len([request for request in recorder.asked(path) if request.method == method])
    op = case.verb.partition(" ")[0]
    assert error.op == (f"commands.{op}" if op.endswith("_stdin") else op)
    nowhere = {"create", "list", "list_snapshots", "delete_snapshot"}
    assert error.sandbox_id == (None if case.verb in nowhere else ID)
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error)) + repr(client) + caplog.text
    assert not [secret for secret in SECRETS if secret in shown]


@pytest.mark.parametrize("verb", API)
async def test_a_verb_without_an_answer_ends_at_its_deadline_and_says_that_it_may_have_happened(
    verb: str, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_API_KEY", KEY)
    # Create, connect and pause have longer ones, lest a pause of gigabytes be given up.
    for module in ("client", "control"):
        monkeypatch.setattr(f"sandbox_tools.client.{module}.LONG_REQUEST", 0.05)
    async with (
        PLACES["e2b"].client(recorder, state) as sure,
        PLACES["e2b"].client(recorder, state, request_timeout=0.05) as client,
    ):
        sandbox = await sure.create()
        recorder.on(*API[verb], Answer(ending="silent"))
        with pytest.raises(RequestTimeoutError) as caught:
            async with asyncio.timeout(20):
                await CALLS[verb](client, sandbox)

    assert isinstance(caught.value, TimeoutError)
    assert caught.value.retryable is None
    assert "may have happened" in str(caught.value)


async def test_a_server_that_is_not_there_is_an_error_that_may_be_repeated(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_API_KEY", KEY)
    closed = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    monkeypatch.setenv("E2B_API_URL", f"http://127.0.0.1:{port}")
    async with PLACES["e2b"].client(Recorder(), state) as client:
        for call in (lambda: client.create(), lambda: client.info(ID)):
            with pytest.raises(ConnectError) as caught:
                await call()
            assert caught.value.retryable is True
            assert "could not be reached" in str(caught.value)


@pytest.mark.parametrize(
    "ending", [executed(*BEGUN, ending="never"), Answer(ending="silent")], ids=["after some output", "at once"]
)
async def test_code_past_its_timeout_is_its_own_error_with_what_it_had_put_out(
    ending: Answer, recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_API_KEY", KEY)
    recorder.on("POST", "/execute", ending)
    async with PLACES["e2b"].client(recorder, state) as client:
        sandbox = await client.create()
        with pytest.raises(ExecutionTimeoutError) as caught:
            await sandbox.run_code("1+1", timeout=0.1)

    assert isinstance(caught.value, TimeoutError)
    assert caught.value.retryable is False
    assert caught.value.partial is not None
    assert ("begun" if ending.body else "") == caught.value.partial.stdout
