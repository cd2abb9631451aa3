"""Where this client does not send what the vendor's SDK sends, each with its reason: there are no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.client.contract.service import ID, TOKEN
from tests.client.contract.vendors import LEGACY_ID, TABLES, Flat, Request


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


CODE = ("run_code", "run_code in a context", "run_code in a language")
CONTEXTS = ("create_context", "list_contexts", "restart_context", "remove_context")

DIFFERENCES: tuple[Difference, ...] = (
    # What a sandbox does when its time is up.
    Difference(
        dialects=E2BS,
        verbs=("create",),
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
            verbs=("create", "create with nothing said"),
            field=("body", *field),
            theirs=ABSENT,
            ours=value,
            reason="As its SDK says it with auto-pause; without a pause there is nothing to wake.",
        )
        for field, value in ((("autoResume",), "object"), (("autoResume", "enabled"), False))
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
    Difference(
        dialects=("novita", "novita-legacy"),
        verbs=("files.write",),
        field=("form",),
        theirs="multipart",
        ours="bytes",
        reason="As the other SDKs: sent as it comes, without a frame; its envd takes both (PROTOCOL.md 4.1).",
    ),
    Difference(
        dialects=ALL,
        verbs=("list",),
        field=("query", "limit"),
        theirs=ABSENT,
        ours="100",
        reason="The same as the server's default, and its most; said so that pages are as few everywhere.",
    ),
)

FURTHER: Mapping[tuple[str, str], tuple[tuple[Request, ...], str]] = {
    **{
        (dialect, "close_stdin"): (
            tuple(replace(row, path="/process.Process/CloseStdin", body={"process": {"pid": 7}}) for row in table["send_stdin"]),
            "envd has it from 0.5.2 on, whichever SDK asks.",
        )
        for dialect, table in TABLES.items()
        if dialect in PPIOS
    },
}
"""By dialect and verb: what this client sends although the SDK has no such call, and why it may."""

REFUSED: Mapping[tuple[str, str], str] = {}
"""By dialect and verb: what this client refuses before any request, and why."""
