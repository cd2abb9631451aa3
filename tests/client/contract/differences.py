"""Where this client does not send what the vendor's SDK sends, each with its reason: there are no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sandbox_tools.client.client import CREATE_KEY
from tests.client.contract.service import ID, KEY, TOKEN
from tests.client.contract.vendors import E2B, LEGACY_ID, TABLES, Flat, Request


class _Sign:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


ABSENT = _Sign("ABSENT")
ANY = _Sign("ANY")
"""Some text of the client's own making."""

ALL = tuple(TABLES)
LEGACY = ("ppio-legacy", "novita-legacy")
PPIOS = ("ppio", "novita", *LEGACY)
E2BS = tuple(name for name in TABLES if name not in PPIOS)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field of some verbs' requests."""

    dialects: tuple[str, ...]
    verbs: tuple[str, ...]
    field: tuple[str, ...]
    theirs: Any
    ours: Any
    reason: str

    def apply(self, fields: Flat) -> Flat:
        """The fields as this client sends them."""
        assert fields.get(self.field, ABSENT) == self.theirs, f"The SDK does not send this: {self}"
        rest = {name: value for name, value in fields.items() if name != self.field}
        return rest if self.ours is ABSENT else {**rest, self.field: self.ours}


CREATES = (
    *("create", "create with nothing said", "create pausing", "create waking"),
    *("create without internet", "create by key"),
)
CODE = ("run_code", "run_code in a context", "run_code in a language")
CONTEXTS = ("create_context", "list_contexts", "restart_context", "remove_context")

DIFFERENCES: tuple[Difference, ...] = (
    # What a sandbox does when its time is up.
    Difference(
        dialects=E2BS,
        verbs=("create", "create without internet", "create by key"),
        field=("body", "autoPause"),
        theirs=ABSENT,
        ours=False,
        reason="Said outright: what a server does where nothing is said is its own affair.",
    ),
    Difference(
        dialects=E2BS,
        verbs=("create with nothing said",),
        field=("body", "autoPause"),
        theirs=ABSENT,
        ours=True,
        reason="The net under a client that dies: its sandbox is paused, and not lost.",
    ),
    Difference(
        dialects=PPIOS,
        verbs=("create with nothing said",),
        field=("body", "autoPause"),
        theirs=False,
        ours=True,
        reason="The net under a client that dies: its sandbox is paused, and not lost.",
    ),
    Difference(
        dialects=LEGACY,
        verbs=("connect",),
        field=("body", "autoPause"),
        theirs=False,
        ours=True,
        reason="Connect sets it anew there; off, it would turn the next timeout into a kill.",
    ),
    Difference(
        dialects=("e2b", "local"),
        verbs=("create with nothing said",),
        field=("body", "timeout"),
        theirs=ABSENT,
        ours=300,
        reason="The same as the server's default, said so that it is the same everywhere.",
    ),
    *(
        Difference(
            dialects=("ppio", "novita"),
            verbs=("create with nothing said",),
            field=("body", *field),
            theirs=ABSENT,
            ours=value,
            reason="As its SDK says it with auto-pause.",
        )
        for field, value in ((("autoResume",), "object"), (("autoResume", "enabled"), False))
    ),
    # A create that is found again.
    Difference(
        dialects=ALL,
        verbs=tuple(verb for verb in CREATES if verb != "create by key"),
        field=("body", "metadata", CREATE_KEY),
        theirs=ABSENT,
        ours=ANY,
        reason="A create whose answer is lost is looked for by it, and not made twice (DESIGN decision 5).",
    ),
    Difference(
        dialects=("e2b", "local"),
        verbs=("create by key",),
        field=("body", "metadata", CREATE_KEY),
        theirs=ABSENT,
        ours="key-1",
        reason="The same, in the caller's words.",
    ),
    Difference(
        dialects=("e2b", "local"),
        verbs=tuple(verb for verb in CREATES if verb != "create by key"),
        field=("header", "idempotency-key"),
        theirs=ABSENT,
        ours=ANY,
        reason="The SDK sends one only where its caller names one; with it the server itself makes no second sandbox.",
    ),
    # Where a request goes.
    *(
        Difference(
            dialects=(dialect,),
            verbs=(*CODE, *CONTEXTS),
            field=("header", f"{dialect.partition('-')[0]}-sandbox-{name}"),
            theirs=ABSENT,
            ours=value,
            reason="As its SDK does for commands and files; leads to the sandbox where one URL stands for all.",
        )
        for dialect in PPIOS
        for name, value in (("id", LEGACY_ID if dialect in LEGACY else ID), ("port", "49999"))
    ),
    *(
        Difference(
            dialects=(dialect,),
            verbs=("connect",),
            field=("header", f"{prefix}-sandbox-{name}"),
            theirs=value,
            ours=ABSENT,
            reason="The path names the sandbox already, and the control plane needs no port.",
        )
        for dialect, prefix in (("ppio", "e2b"), ("novita", "novita"))
        for name, value in (("id", ID), ("port", "49983"))
    ),
    Difference(
        dialects=E2BS,
        verbs=CONTEXTS,
        field=("header", "x-access-token"),
        theirs=ABSENT,
        ours=TOKEN,
        reason="As its SDK does for code: whoever may run code may be asked to show it for the rest of that port too.",
    ),
    Difference(
        dialects=ALL,
        verbs=("list_contexts", "restart_context", "remove_context"),
        field=("header", "content-type"),
        theirs="application/json",
        ours=ABSENT,
        reason="There is no body whose type could be said.",
    ),
    # A command whose start was cancelled.
    Difference(
        dialects=ALL,
        verbs=("commands.run", "commands.run as root", "commands.run without a limit", "commands.run with stdin"),
        field=("body", "tag"),
        theirs=ABSENT,
        ours=ANY,
        reason="Its process id comes with the answer; where that is not waited for, it is killed by its tag.",
    ),
    # How long is waited.
    Difference(
        dialects=PPIOS,
        verbs=(
            *("commands.list", "commands.kill", "send_stdin", "close_stdin"),
            *("files.list", "files.list deep", "files.info", "files.exists"),
            *("files.make_dir", "files.move", "files.remove"),
        ),
        field=("header", "connect-timeout-ms"),
        theirs=ABSENT,
        ours="60000",
        reason="As E2B's SDK does: who is told how long anybody waits for it need not work any longer.",
    ),
    Difference(
        dialects=ALL,
        verbs=("commands.connect",),
        field=("header", "connect-timeout-ms"),
        theirs="60000",
        ours=ABSENT,
        reason="A command is followed for as long as it runs; what ends it is the timeout that it was started with.",
    ),
    # What a request looks like.
    Difference(
        dialects=("ppio", "novita"),
        verbs=("delete_snapshot",),
        field=("path",),
        theirs="/templates/team/snap:default",
        ours="/templates/team%2Fsnap%3Adefault",
        reason="As E2B's SDK does: one id is one part of the path.",
    ),
    *(
        Difference(
            dialects=("novita", "novita-legacy"),
            verbs=("files.write",),
            field=name,
            theirs=theirs,
            ours=ours,
            reason="As the other SDKs: sent as it comes, without a frame; its envd takes both (PROTOCOL.md 4.1).",
        )
        for name, theirs, ours in (
            (("form",), "multipart", "bytes"),
            (("header", "content-type"), "multipart/form-data", "application/octet-stream"),
            (("body",), "object", b"hello"),
            (("body", "name"), "file", ABSENT),
            (("body", "filename"), "dir/é a.txt", ABSENT),
            (("body", "content"), b"hello", ABSENT),
        )
    ),
    Difference(
        dialects=ALL,
        verbs=("list", "list by template"),
        field=("query", "limit"),
        theirs=ABSENT,
        ours="100",
        reason="The same as the server's default, and its most; said so that pages are as few everywhere.",
    ),
)

_LOOK = Request(
    to="api",
    method="GET",
    path="/v2/sandboxes",
    query={"limit": "100", "metadata": "sandbox-tools%252Fcreate%3Dkey-1"},
    headers={"x-api-key": KEY},
)

FURTHER: Mapping[tuple[str, str], tuple[tuple[Request, ...], str]] = {
    **{
        (dialect, "close_stdin"): (
            tuple(
                replace(
                    row,
                    path="/process.Process/CloseStdin",
                    body={"process": {"pid": 7}},
                    headers={**row.headers, "connect-timeout-ms": "60000"},
                )
                for row in table["send_stdin"]
            ),
            "envd has it from 0.5.2 on, whichever SDK asks.",
        )
        for dialect, table in TABLES.items()
        if dialect in PPIOS
    },
    **{
        (dialect, "look for a key"): ((_LOOK,), "What a create by the same key has made before is taken.")
        for dialect in TABLES
    },
    **{
        (dialect, "create by key"): (
            tuple(
                replace(row, body={**row.body, "timeout": 123, "autoPause": False, "metadata": {CREATE_KEY: "key-1"}})
                for row in table["create with nothing said"]
            ),
            "Without the header, the metadata alone says which create it was.",
        )
        for dialect, table in TABLES.items()
        if "create by key" not in table
    },
    **{
        (dialect, "list by template"): (
            tuple(replace(row, query={**row.query, "limit": "100"}) for row in E2B["list by template"]),
            "Asked for whether or not the service knows it: what it lets through is filtered again here.",
        )
        for dialect in PPIOS
    },
}
"""By dialect and verb: what this client sends although the SDK has no such call, and why it may."""

REFUSED: Mapping[tuple[str, str], str] = {
    **{
        (dialect, verb): "Its SDK refuses it on these domains too."
        for dialect in LEGACY
        for verb in ("snapshot", "snapshot by name", "list_snapshots", "list_snapshots of one", "delete_snapshot")
    },
    **{(dialect, "snapshot by name"): "Its SDK has no names for snapshots." for dialect in ("ppio", "novita")},
    **{(dialect, "pause without memory"): "Its SDK has no such pause." for dialect in PPIOS},
}
"""By dialect and verb: what this client refuses before any request, and why."""
