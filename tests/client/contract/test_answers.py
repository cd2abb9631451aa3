"""Each success of PROTOCOL.md 2 and 3 becomes the right result, fields of the future and absent ones included."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.errors import CapacityError, NotFoundError, RateLimitError, SandboxError, SandboxExpiredError
from sandbox_tools.models import (
    CodeContext,
    CommandResult,
    EntryInfo,
    Failure,
    Lifecycle,
    Metric,
    ProcessInfo,
    SnapshotInfo,
    Stderr,
    Stdout,
    WrittenFile,
)
from tests.client.contract.ours import CALLS, all_of
from tests.client.contract.places import PLACES
from tests.client.contract.recorder import Answer, Recorder, refused, said
from tests.client.contract.service import (
    CLIENT_ID,
    CONTEXT,
    DETAIL,
    ENTRY,
    GRANT,
    ID,
    KEY,
    METRIC,
    NO_CONTENT,
    PROCESS,
    ROW,
    SNAPSHOT,
    STARTED,
    TOKEN,
    encoded,
    executed,
    paused,
    streamed,
    unknown,
)

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


NOON = datetime(2026, 11, 23, 7, 0, 0, 123456, UTC)
FILE = EntryInfo(
    path="/home/user/a.txt",
    name="a.txt",
    type="file",
    size=5,
    mode=0o644,
    permissions="-rw-r--r--",
    owner="user",
    group="user",
    modified_time=NOON,
)
SAMPLE = Metric(
    timestamp=NOON,
    cpu_count=2,
    cpu_used_pct=12.5,
    mem_used=100 << 20,
    mem_total=512 << 20,
    mem_cache=10 << 20,
    disk_used=1 << 30,
    disk_total=10 << 30,
)
RAN = CommandResult(exit_code=0, stdout="hi\n", stderr="warned\n")
TAKEN = SnapshotInfo(snapshot_id=SNAPSHOT, names=["snap"])

WELL: dict[str, Any] = {
    "kill": True,
    "set_timeout": None,
    "metrics": [SAMPLE],
    "metrics between": [SAMPLE],
    "snapshot": TAKEN,
    "snapshot by name": TAKEN,
    "list_snapshots": [TAKEN],
    "list_snapshots of one": [TAKEN],
    "delete_snapshot": True,
    "create_context": CodeContext(id="c1", language="python", cwd="/tmp"),
    "list_contexts": [CodeContext(id="c1", language="python", cwd="/tmp")],
    "restart_context": None,
    "remove_context": True,
    "commands.run": RAN,
    "commands.run as root": RAN,
    "commands.list": [
        ProcessInfo.model_validate({"pid": 7, "config": {"cmd": "/bin/bash", "args": ["-l", "-c", "echo hi"]}})
    ],
    "commands.kill": True,
    "files.read": b"hello",
    "files.write": WrittenFile(path="/home/user/a.txt", name="a.txt", type="file"),
    "files.list": [FILE],
    "files.list deep": [FILE],
    "files.info": FILE,
    "files.exists": True,
    "files.make_dir": True,
    "files.move": FILE,
    "files.remove": None,
}
"""What each verb gives where all is well."""


@pytest.mark.parametrize("verb", WELL)
async def test_each_verb_gives_what_the_wire_said(client: Client, verb: str) -> None:
    assert WELL[verb] == await CALLS[verb](client, await client.create())


async def test_a_process_says_what_it_is_without_its_secrets(client: Client, recorder: Recorder) -> None:
    config = {"cmd": "/bin/bash", "args": ["-l"], "envs": {"A": "s3cret"}, "cwd": "/tmp"}
    recorder.on("POST", "/process.Process/List", said(200, {"processes": [{"config": config, "pid": 8, "tag": "t"}]}))
    (info,) = await (await client.create()).commands.list()

    assert (8, "t", "/bin/bash", ["-l"], "/tmp", {"A": "s3cret"}) == (
        info.pid,
        info.tag,
        info.cmd,
        info.args,
        info.cwd,
        info.env,
    )
    assert "s3cret" not in repr(info)


NO_FILE = said(404, {"code": "not_found", "message": "no such file"})
NO_CONTEXT = Answer(status=404, body=b"Context c1 not found", headers={"content-type": "text/plain"})

# What else a verb may be answered, and what it gives then.
OTHERWISE: list[tuple[str, str, str, Answer, Any]] = [
    ("delete_snapshot", "DELETE", "/templates/.*", refused(404, "template not found"), False),
    ("list_snapshots", "GET", "/snapshots", said(200, None), []),
    ("list_snapshots", "GET", "/snapshots", said(200, [{"snapshotID": "s1"}]), [SnapshotInfo(snapshot_id="s1")]),
    ("metrics", "GET", f"/sandboxes/{ID}/metrics", said(200, []), []),
    ("metrics", "GET", f"/sandboxes/{ID}/metrics", said(200, [{"timestamp": STARTED}]), [Metric(timestamp=NOON)]),
    (
        "metrics",
        "GET",
        f"/sandboxes/{ID}/metrics",
        said(200, [{**METRIC, "memCache": None, "diskUsed": None}]),
        [SAMPLE.model_copy(update={"mem_cache": None, "disk_used": None})],
    ),
    (
        "metrics",
        "GET",
        f"/sandboxes/{ID}/metrics",
        Answer(body=f'[{{"timestamp": "{STARTED}", "memUsedMiB": 1e999}}]'.encode()),
        [Metric(timestamp=NOON)],
    ),
    ("snapshot", "POST", f"/sandboxes/{ID}/snapshots", said(201, {"snapshotID": "s1"}), SnapshotInfo(snapshot_id="s1")),
    ("list_contexts", "GET", "/contexts", said(200, {"contexts": [CONTEXT]}), WELL["list_contexts"]),
    ("list_contexts", "GET", "/contexts", said(200, [{**CONTEXT, "ofTheFuture": 1}]), WELL["list_contexts"]),
    ("remove_context", "DELETE", "/contexts/.*", NO_CONTENT, True),
    ("remove_context", "DELETE", "/contexts/.*", NO_CONTEXT, False),
    ("restart_context", "POST", "/contexts/.*/restart", NO_CONTENT, None),
    ("commands.kill", "POST", "/process.Process/SendSignal", NO_FILE, False),
    ("commands.list", "POST", "/process.Process/List", said(200, {}), []),
    (
        "commands.run",
        "POST",
        "/process.Process/Start",
        streamed(PROCESS[0], {"event": {"end": {"exitCode": 3, "exited": True, "error": "exit status 3"}}}),
        CommandResult(exit_code=3, error="exit status 3"),
    ),
    (
        "commands.run",
        "POST",
        "/process.Process/Start",
        streamed(
            PROCESS[0], {"event": {"end": {"exitCode": -1, "status": "signal: killed", "error": "signal: killed"}}}
        ),
        CommandResult(exit_code=-1, error="signal: killed"),
    ),
    (
        "commands.run",
        "POST",
        "/process.Process/Start",
        streamed(
            PROCESS[0],
            {"event": {"data": {"stdout": "4g=="}}},  # the first byte of "€", and then the others
            {"event": {"data": {"stdout": "gqw="}}},
            {"event": {"data": {"pty": encoded("not of a command without one")}}},
            {"event": {"of_the_future": {}}},
            PROCESS[-1],
        ),
        CommandResult(exit_code=0, stdout="€"),
    ),
    ("files.exists", "POST", "/filesystem.Filesystem/Stat", NO_FILE, False),
    ("files.list", "POST", "/filesystem.Filesystem/ListDir", said(200, {}), []),
    (
        "files.make_dir",
        "POST",
        "/filesystem.Filesystem/MakeDir",
        said(409, {"code": "already_exists", "message": "it is there"}),
        False,
    ),
    (
        "files.info",
        "POST",
        "/filesystem.Filesystem/Stat",
        said(
            200,
            {
                "entry": {
                    **ENTRY,
                    "type": "FILE_TYPE_DIRECTORY",
                    "size": 5,
                    "symlinkTarget": "/x",
                    "metadata": {"k": "v"},
                }
            },
        ),
        FILE.model_copy(update={"type": "directory", "symlink_target": "/x", "metadata": {"k": "v"}}),
    ),
    (
        "files.info",
        "POST",
        "/filesystem.Filesystem/Stat",
        said(200, {"entry": {"name": "a", "path": "/a"}}),  # what is nought is left out
        EntryInfo(name="a", path="/a"),
    ),
    ("files.read", "GET", "/files", Answer(body=b""), b""),
]


@pytest.mark.parametrize(("verb", "method", "path", "answer", "outcome"), OTHERWISE)
async def test_each_verb_gives_what_else_the_wire_may_say(
    client: Client, recorder: Recorder, verb: str, method: str, path: str, answer: Answer, outcome: Any
) -> None:
    recorder.on(method, path, answer)

    assert outcome == await CALLS[verb](client, await client.create())


async def test_pages_of_snapshots_are_followed_until_no_token_comes(client: Client, recorder: Recorder) -> None:
    first = said(200, [{"snapshotID": "s1"}, {"snapshotID": "s2"}], x_next_token="t")
    recorder.on("GET", "/snapshots", first, said(200, [{"snapshotID": "s2"}, {"snapshotID": "s3"}]))

    assert ["s1", "s2", "s3"] == [each.snapshot_id for each in await all_of(client.list_snapshots())]
    assert "t" == recorder.requests[-1].query["nextToken"]


async def test_a_null_is_what_an_absent_field_is_at_every_depth(client: Client, recorder: Recorder) -> None:
    copy = {"sandbox": {**GRANT, "sandboxID": "icopy", "clientID": None, "envdVersion": None}, "error": None}
    recorder.on("POST", f"/sandboxes/{ID}/fork", said(201, [copy]))
    recorder.on("GET", f"/sandboxes/{ID}", said(200, {**ROW, "metadata": None, "lifecycle": {"autoResume": None}}))

    (made,) = await client.fork(ID)
    info = await client.info(ID)

    assert isinstance(made, Sandbox)
    assert "icopy" == made.id
    assert ({}, Lifecycle()) == (info.metadata, info.lifecycle)


async def test_each_copy_of_a_fork_can_be_used_or_says_why_there_is_none(client: Client, recorder: Recorder) -> None:
    rows: list[dict[str, Any]] = [
        {"sandbox": {**GRANT, "sandboxID": "icopy"}},
        *({"error": {"code": code, "message": f"because of {TOKEN}"}} for code in (429, 503, 404)),
    ]
    recorder.on("POST", f"/sandboxes/{ID}/fork", said(201, rows))
    copy, *errors = await client.fork(ID, count=5)

    assert isinstance(copy, Sandbox)
    assert "icopy" == copy.id
    await copy.run_code("1+1")
    assert ("icopy", TOKEN) == tuple(recorder.requests[-1].headers[n] for n in ("e2b-sandbox-id", "x-access-token"))
    assert [RateLimitError, CapacityError] == [type(error) for error in errors[:2]]
    assert 4 == len(errors)
    for error in errors:
        assert isinstance(error, SandboxError)
        assert ("fork", ID) == (error.op, error.sandbox_id)
        assert TOKEN not in str(error)
        # Whatever could not be copied, the original is not gone.
        assert not isinstance(error, (NotFoundError, SandboxExpiredError))
