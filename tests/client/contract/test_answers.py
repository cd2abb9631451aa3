"""Each success of PROTOCOL.md 2 and 3 becomes the right result, fields of the future and absent ones included."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox_tools.client import Client
from sandbox_tools.errors import SandboxError
from sandbox_tools.models import Failure, Stderr, Stdout
from tests.client.contract.ours import all_of
from tests.client.contract.places import PLACES
from tests.client.contract.recorder import Answer, Recorder, refused, said
from tests.client.contract.service import CLIENT_ID, DETAIL, GRANT, ID, KEY, ROW, executed, paused, unknown

NO_SUCH = unknown()


@pytest.fixture
async def client(recorder: Recorder, state: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    monkeypatch.setenv("E2B_API_KEY", KEY)
    async with PLACES["e2b"].client(recorder, state) as client:
        yield client


async def test_a_grant_gives_a_sandbox_that_can_be_used(client: Client) -> None:
    created, found = await client.create(), await client.connect(ID)

    assert (ID, "code-interpreter-v1") == (created.id, created.template_id) == (found.id, found.template_id)


async def test_a_grant_of_the_required_fields_alone_is_enough(client: Client, recorder: Recorder) -> None:
    required = {name: GRANT[name] for name in ("templateID", "sandboxID", "clientID", "envdVersion")}
    recorder.on("POST", "/v2/sandboxes", said(201, required))

    await (await client.create()).run_code("1+1")
    assert not {"x-access-token", "e2b-traffic-access-token"} & set(recorder.requests[-1].headers)


async def test_info_and_rows_say_what_the_wire_said(client: Client, recorder: Recorder) -> None:
    info = await client.info(ID)
    (row,) = await all_of(client.list())

    for shown in (info, row):
        assert (ID, CLIENT_ID, "running", {"k 1": "v&=/é"}) == (
            shown.sandbox_id,
            shown.client_id,
            shown.state,
            shown.metadata,
        )
        assert datetime(2026, 11, 23, 7, 0, 0, 123456, UTC) == shown.started_at
        assert datetime(2026, 11, 23, 7, 5, 0, 123456, UTC) == shown.end_at
        assert (2, 512, 1024, "0.6.13") == (shown.cpu_count, shown.memory_mb, shown.disk_size_mb, shown.envd_version)
    assert info.lifecycle is not None
    assert (False, "pause") == (info.lifecycle.auto_resume, info.lifecycle.on_timeout)
    recorder.on("GET", f"/sandboxes/{ID}", paused())
    assert "paused" == (await client.info(ID)).state


async def test_a_row_of_the_required_fields_alone_is_enough(client: Client, recorder: Recorder) -> None:
    least = {name: value for name, value in ROW.items() if name not in ("alias", "metadata", "volumeMounts")}
    recorder.on(
        "GET", "/v2/sandboxes", said(200, [least, {**least, "sandboxID": "i2", "metadata": None, "alias": None}])
    )

    assert [(ID, {}), ("i2", {})] == [(row.sandbox_id, row.metadata) for row in await all_of(client.list())]


async def test_pages_are_followed_until_no_token_comes(client: Client, recorder: Recorder) -> None:
    """An empty token is none."""
    first = said(200, [ROW], x_next_token="a/b==__i 1")
    last = said(200, [{**ROW, "sandboxID": "i2"}], x_next_token="")
    recorder.on("GET", "/v2/sandboxes", first, last)

    assert [ID, "i2"] == [row.sandbox_id for row in await all_of(client.list())]
    assert ["a%2Fb%3D%3D__i%201", "a%2Fb%3D%3D__i+1"].count(recorder.requests[-1].query["nextToken"])


@pytest.mark.parametrize(("answer", "outcome"), [(Answer(status=204), True), (NO_SUCH, False)], ids=["204", "404"])
async def test_a_kill_says_whether_there_was_something_to_kill(
    client: Client, recorder: Recorder, answer: Answer, outcome: bool
) -> None:
    recorder.on("DELETE", f"/sandboxes/{ID}", answer)

    assert outcome is await client.kill(ID)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(Answer(status=204), True), (refused(409, f'Sandbox "{ID}" is already paused'), False)],
    ids=["204", "409"],
)
async def test_a_pause_says_whether_it_paused(
    client: Client, recorder: Recorder, answer: Answer, outcome: bool
) -> None:
    recorder.on("POST", f"/sandboxes/{ID}/pause", answer)
    recorder.on("GET", f"/sandboxes/{ID}", paused())

    assert outcome is await client.pause(ID)


async def test_a_pause_whose_first_answer_was_lost_is_no_error(client: Client, recorder: Recorder) -> None:
    """Done by the attempt that nobody heard of, and refused the second time."""
    recorder.on("POST", f"/sandboxes/{ID}/pause", Answer(ending="deaf"), refused(409, "It is already paused"))
    recorder.on("GET", f"/sandboxes/{ID}", paused())

    assert await client.pause(ID) is False


async def test_set_timeout_takes_an_answer_without_a_body(client: Client) -> None:
    assert await client.set_timeout(ID, 60) is None


async def test_code_s_events_are_collected_and_unknown_ones_passed_over(client: Client) -> None:
    sandbox = await client.create()
    events: list[object] = []
    execution = await sandbox.run_code("1+1", on_event=events.append)

    assert ("out\n", "err\n", "2", 3, None) == (
        execution.stdout,
        execution.stderr,
        execution.text,
        execution.execution_count,
        execution.failure,
    )
    stdout = next(event for event in events if isinstance(event, Stdout))
    stderr = next(event for event in events if isinstance(event, Stderr))
    assert (str, int) == (type(stdout.timestamp), type(stderr.timestamp))


KINDS = {
    "text": "t",
    "html": "<b>",
    "markdown": "*m*",
    "svg": "<svg/>",
    "png": "aW4=",
    "jpeg": "aW4=",
    "pdf": "aW4=",
    "latex": "$l$",
    "json": {"a": 1},
    "javascript": "j()",
    "data": {"column": [1]},
    "chart": {"type": "line"},
    "extra": {"application/x-own": "x"},
}


async def test_a_result_has_every_kind_that_was_sent(client: Client, recorder: Recorder) -> None:
    both = [{"type": "result", **KINDS, "is_main_result": main} for main in (False, True)]
    recorder.on("POST", "/execute", executed(*both, {"type": "end_of_execution"}))
    execution = await (await client.create()).run_code("1+1")

    assert [False, True] == [result.is_main_result for result in execution.results]
    for result in execution.results:
        shown = result.model_dump(by_alias=True, exclude={"type", "is_main_result", "omitted_bytes"})
        assert KINDS == shown


@pytest.mark.parametrize(
    "name", ["ZeroDivisionError", "UnexpectedEndOfExecution", "WebSocketError", "ContextRestarting", "ExecutionAborted"]
)
async def test_code_that_fails_is_a_result_whatever_made_it_fail(client: Client, recorder: Recorder, name: str) -> None:
    error = {"type": "error", "name": name, "value": "division by zero", "traceback": "line 1\nline 2"}
    recorder.on("POST", "/execute", executed(error, {"type": "end_of_execution"}))

    execution = await (await client.create()).run_code("1/0")
    assert Failure(name=name, value="division by zero", traceback="line 1\nline 2") == execution.failure


async def test_what_info_adds_is_no_reason_to_refuse_it(client: Client, recorder: Recorder) -> None:
    recorder.on("GET", f"/sandboxes/{ID}", said(200, {**DETAIL, "pauseMode": "filesystem", "newField": [1]}))

    assert ID == (await client.info(ID)).sandbox_id


async def test_a_state_that_nobody_knows_is_an_error_and_not_a_guess(client: Client, recorder: Recorder) -> None:
    recorder.on("GET", f"/sandboxes/{ID}", said(200, {**DETAIL, "state": "hibernating"}))

    with pytest.raises(SandboxError):
        await client.info(ID)
