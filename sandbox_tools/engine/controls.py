"""The control plane's operations that do something to sandboxes and snapshots: call, and say what came of it."""

from __future__ import annotations

from typing import Any

from sandbox_tools.engine import copies
from sandbox_tools.engine.bodies import (
    Clone,
    Connect,
    Fork,
    NewSandbox,
    Pause,
    Refresh,
    Reset,
    SetTimeout,
    TakeSnapshot,
)
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.saved import normalised
from sandbox_tools.engine.operations import Answer, Call, Operation, error_body
from sandbox_tools.engine.records import new_token
from sandbox_tools.engine.reports import shown
from sandbox_tools.engine.unsupported import refuse
from sandbox_tools.models import CloneResult, ForkResult, SandboxGrant, SnapshotInfo


async def create(call: Call) -> Answer:
    """The first version: a sandbox may be told to ask for no token."""
    return await _create(call, call.body, None)


async def create_v2(call: Call) -> Answer:
    """The second version: always secure."""
    request = call.body.model_copy(update={"secure": True})
    return await _create(call, request, call.headers.get("idempotency-key"))


async def _create(call: Call, request: NewSandbox, key: str | None) -> Answer:
    if request.unsupported:
        raise refuse(" and ".join(f"`{name}`" for name in request.unsupported), "This engine has none of them.")
    entry = await call.supervisor.create(request, key)
    return _granted(call, entry, 201)


async def connect(call: Call) -> Answer:
    """200: it ran and was extended at most; 201: it was resumed."""
    body: Connect = call.body
    entry, resumed = await call.supervisor.connect(
        call.sandbox_id, body.timeout, memory=body.memory is not False, changes=_changes(body, resumed=True)
    )
    if not resumed:
        await _apply(call, entry, body)
    return _granted(call, entry, 201 if resumed else 200)


async def resume(call: Call) -> Answer:
    """As connect, for a sandbox that is paused."""
    body: Connect = call.body
    entry = await call.supervisor.resume(
        call.sandbox_id, body.timeout, memory=body.memory is not False, changes=_changes(body, resumed=True)
    )
    return _granted(call, entry, 201)


def _changes(body: Connect, *, resumed: bool) -> dict[str, Any]:
    """What a connect changes of a sandbox's record."""
    changes: dict[str, Any] = {}
    if body.secure is not None:
        changes["secure"] = body.secure
    if body.public is not None:
        changes["traffic_token"] = None if body.public else new_token()
    # A running sandbox keeps what it was told, as most that connect say nothing about it on purpose.
    if resumed and body.auto_pause is not None:
        changes["auto_pause"] = body.auto_pause
    return changes


async def _apply(call: Call, entry: Entry, body: Connect) -> None:
    changes = _changes(body, resumed=False)
    if body.public is False and entry.record.traffic_token is not None:
        del changes["traffic_token"]
    if any(getattr(entry.record, name) != value for name, value in changes.items()):
        await call.supervisor.change(entry.record.id, changes)


async def freeze(call: Call) -> Answer:
    """Answers when the sandbox stands still."""
    await call.supervisor.freeze(call.sandbox_id)
    return Answer(status=204)


async def pause(call: Call) -> Answer:
    """Answers when the pause is complete."""
    body: Pause = call.body
    await call.supervisor.pause(
        call.sandbox_id, memory=body.memory is not False, healthy=bool(body.require_healthy_guest)
    )
    return Answer(status=204)


async def reset(call: Call) -> Answer:
    """PPIO's way to drop the memory and go on, or not."""
    body: Reset = call.body
    if body.resume is False:
        await call.supervisor.pause(call.sandbox_id, memory=False)
        entry = call.supervisor.entry(call.sandbox_id)
    else:
        entry = await call.supervisor.reboot(call.sandbox_id, body.timeout)
    await _apply(call, entry, body)
    return _granted(call, entry, 200)


async def kill(call: Call) -> Answer:
    """Running or paused."""
    await call.supervisor.kill(call.sandbox_id)
    return Answer(status=204)


async def set_timeout(call: Call) -> Answer:
    """From now."""
    body: SetTimeout = call.body
    await call.supervisor.set_timeout(call.sandbox_id, body.timeout)
    return Answer(status=204)


async def refresh(call: Call) -> Answer:
    """Only ever extends."""
    body: Refresh = call.body
    await call.supervisor.refresh(call.sandbox_id, body.duration)
    return Answer(status=204)


async def take_snapshot(call: Call) -> Answer:
    """The sandbox runs on."""
    body: TakeSnapshot = call.body
    taken = await copies.snapshot(call.supervisor, call.sandbox_id, name=body.name, memory=body.memory is not False)
    return Answer(status=201, content=shown(call.supervisor, taken))


async def delete_snapshot(call: Call) -> Answer:
    """The sandboxes made from it live on."""
    supervisor = call.supervisor
    await supervisor.carry_out(supervisor.saved.remove(normalised(call.path["templateID"], "delete")))
    return Answer(status=204)


async def fork(call: Call) -> Answer:
    """One result for each copy."""
    body: Fork = call.body
    outcomes = await copies.fork(call.supervisor, call.sandbox_id, count=body.count or 1, timeout=body.timeout)
    results = [
        ForkResult(sandbox=outcome.record.grant(call.engine.domain))
        if isinstance(outcome, Entry)
        else ForkResult(error=error_body(outcome))
        for outcome in outcomes
    ]
    return Answer(status=201, content=results)


async def clone(call: Call) -> Answer:
    """PPIO's fork."""
    body: Clone = call.body
    made = await copies.clone(
        call.supervisor, call.sandbox_id, count=body.count or 1, timeout=body.timeout, strict=bool(body.strict)
    )
    return Answer(status=201, content=CloneResult(sandboxes=[each.record.grant(call.engine.domain) for each in made]))


def _granted(call: Call, entry: Entry, status: int) -> Answer:
    return Answer(status=status, content=entry.record.grant(call.engine.domain))


def _post(verb: str, **rest: Any) -> Operation:
    return Operation(method="POST", path=f"/sandboxes/{{sandboxID}}/{verb}", **rest)


_CREATE: dict[str, Any] = {
    "method": "POST",
    "summary": "Create a sandbox from a template or a snapshot",
    "body": NewSandbox,
    "body_required": True,
    "answers": {201: SandboxGrant},
    "yields": ((201, "sandboxID", "/sandboxID"),),
}
_CONNECT: dict[str, Any] = {
    "summary": "Have a sandbox running: extended where it runs, resumed where it is paused",
    "body": Connect,
    "answers": {200: SandboxGrant, 201: SandboxGrant},
    "errors": (404, 409, 429),
    "handler": connect,
}

OPERATIONS: tuple[Operation, ...] = (
    Operation(name="create", path="/sandboxes", handler=create, errors=(403, 404, 429), **_CREATE),
    Operation(
        name="createV2",
        path="/v2/sandboxes",
        handler=create_v2,
        keyed=True,
        errors=(403, 404, 409, 422, 429),
        **_CREATE,
    ),
    Operation(
        name="kill",
        method="DELETE",
        path="/sandboxes/{sandboxID}",
        summary="End a sandbox, running or paused",
        handler=kill,
        answers={204: None},
        errors=(404,),
    ),
    _post(
        "freeze",
        name="freeze",
        summary="Stop a sandbox's processes and keep its RAM, until something reaches it",
        handler=freeze,
        answers={204: None},
        errors=(404, 409),
        extension=True,
    ),
    _post(
        "pause",
        name="pause",
        summary="Memory and files to disk",
        handler=pause,
        body=Pause,
        answers={204: None},
        errors=(404, 409),
    ),
    _post(
        "resume",
        name="resume",
        summary="Resume a paused sandbox",
        handler=resume,
        body=Connect,
        answers={201: SandboxGrant},
        errors=(404, 409, 429),
    ),
    _post("connect", name="connect", **_CONNECT),
    Operation(name="connectV2", method="POST", path="/v2/sandboxes/{sandboxID}/connect", **_CONNECT),
    _post(
        "timeout",
        name="setTimeout",
        summary="Move a running sandbox's end",
        handler=set_timeout,
        body=SetTimeout,
        body_required=True,
        answers={204: None},
        errors=(404, 409),
    ),
    _post(
        "refreshes",
        name="refresh",
        summary="Have a running sandbox live longer",
        handler=refresh,
        body=Refresh,
        answers={204: None},
        errors=(404, 409),
    ),
    _post(
        "snapshots",
        name="takeSnapshot",
        summary="Take a snapshot of a running sandbox",
        handler=take_snapshot,
        body=TakeSnapshot,
        answers={201: SnapshotInfo},
        yields=((201, "templateID", "/snapshotID"),),
        errors=(404, 409),
    ),
    _post(
        "fork",
        name="fork",
        summary="Copy a running sandbox, memory and all",
        handler=fork,
        body=Fork,
        answers={201: list[ForkResult]},
        errors=(404, 409),
    ),
    _post(
        "clone",
        name="clone",
        summary="Copy a running sandbox, as PPIO's SDK asks for it",
        handler=clone,
        body=Clone,
        answers={201: CloneResult},
        errors=(404, 409, 429),
    ),
    _post(
        "reset",
        name="reset",
        summary="Reboot a sandbox, as PPIO's SDK asks for it",
        handler=reset,
        body=Reset,
        answers={200: SandboxGrant},
        errors=(404, 409, 429),
    ),
    Operation(
        name="deleteSnapshot",
        method="DELETE",
        path="/templates/{templateID:path}",
        summary="Delete a snapshot",
        handler=delete_snapshot,
        answers={204: None},
        errors=(404,),
    ),
)
