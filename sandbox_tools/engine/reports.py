"""The control plane's operations that only tell: what there is, what it takes, what happened to it."""

from __future__ import annotations

import asyncio
import os
from datetime import datetime

from sandbox_tools.engine.bodies import (
    Detail,
    Filter,
    ListQuery,
    LogsQuery,
    LogsV2,
    LogsV2Query,
    ManyMetrics,
    ManyMetricsQuery,
    Metric,
    MetricsQuery,
    SnapshotsQuery,
)
from sandbox_tools.engine.bounds import size_in_force
from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.saved import Snapshot, normalised
from sandbox_tools.engine.journal import LEVELS, Line
from sandbox_tools.engine.listing import Row, has, micros, page, parse_metadata
from sandbox_tools.engine.metering import Sample
from sandbox_tools.engine.operations import Answer, Call, Operation
from sandbox_tools.engine.supervisor import Supervisor
from sandbox_tools.errors import ConfigError, NotFoundError
from sandbox_tools.models import LogEntry, LogLine, Logs, SandboxInfo, SnapshotInfo, State

_MOST_IDS = 100

# Unix seconds reach this in the year 5138; before it, milliseconds lie in 1973.
_MILLISECONDS = 10**11


_NEXT = {"X-Next-Token": "`nextToken` of the next page; only where there is one"}


async def health(call: Call) -> Answer:
    """Answers once the engine can create."""
    assert call.supervisor
    return Answer(content="OK")


async def info(call: Call) -> Answer:
    """One sandbox, with its token and what it holds in memory."""
    supervisor = call.supervisor
    entry, resident = supervisor.entry(call.sandbox_id), 0
    if entry.phase == "running":
        # The kernel goes through all pages of its processes: 50 ms where it holds a gigabyte.
        resident = await asyncio.to_thread(supervisor.lifecycle.resident_bytes, entry)
        entry = supervisor.entry(call.sandbox_id)
    row = _info(call, entry).model_copy(update={"resident_bytes": resident if entry.phase == "running" else 0})
    record = entry.record
    return Answer(
        content=Detail(
            **row.model_dump(),
            envd_access_token=record.token,
            allow_internet_access=record.internet,
            domain=call.engine.domain if row.state == "running" else None,
            network=None if record.network is None else record.network,
            pause_mode=("full" if record.pause_memory else "filesystem") if entry.phase == "paused" else None,
        )
    )


async def list_running(call: Call) -> Answer:
    """The first version: all that run, in one page."""
    query: Filter = call.query
    wanted = parse_metadata(query.metadata)
    found = [
        each for each in call.supervisor.entries() if _state(each) == "running" and has(each.record.metadata, wanted)
    ]
    entries, _ = page([entry.row for entry in found], limit=None, order=None, token=None, now=call.supervisor.now())
    return Answer(content=[_info(call, entry) for entry in entries])


async def list_all(call: Call) -> Answer:
    """The second version: filtered, ordered, in pages."""
    query: ListQuery = call.query
    wanted, template = parse_metadata(query.metadata), _template_name(query.template)
    found = call.supervisor.entries()
    # One filter after the other, each only where it is asked for: there may be thousands.
    if wanted:
        found = [each for each in found if has(each.record.metadata, wanted)]
    if template is not None:
        found = [each for each in found if each.record.template_name.removesuffix(":default") == template]
    if query.started_after is not None:
        found = [each for each in found if each.record.started_at > query.started_after]
    running: list[Entry] = []
    paused: list[Entry] = []
    for each in found:
        (running if _state(each) == "running" else paused).append(each)
    states = query.state.split(",")
    found = (running if "running" in states else []) + (paused if "paused" in states else [])
    entries, token = page(
        [entry.row for entry in found],
        limit=query.limit,
        order=query.order,
        token=query.next_token,
        now=call.supervisor.now(),
    )
    headers = {"X-Next-Token": token} if token else {}
    if "running" in states:
        headers["X-Total-Running"] = str(len(running))
    return Answer(content=[_info(call, entry) for entry in entries], headers=headers)


def _template_name(reference: str | None) -> str | None:
    if reference is None:
        return None
    name, _, tag = normalised(reference, "list").partition(":")
    if ":" in reference and tag != "default":
        msg = f"Invalid template filter: {reference!r} has a tag. Leave it out."
        raise ConfigError(msg, op="list")
    return name


def _state(entry: Entry) -> State:
    """What is shown: a sandbox on its way to a snapshot is as good as paused."""
    return "running" if entry.phase == "running" else "paused" if _pausing(entry) else entry.record.state


def _pausing(entry: Entry) -> bool:
    return entry.phase in ("pausing", "shutting down")


def _info(call: Call, entry: Entry) -> SandboxInfo:
    disk = os.statvfs(call.supervisor.lifecycle.sandboxes)
    # What a sandbox may fill: it shares the disk of its host, up to a limit of its own.
    size = disk.f_blocks * disk.f_frsize >> 20
    limit = call.supervisor.bounds.disk(entry.record.disk_mb)
    if limit:
        size = min(size, size_in_force(limit, entry.record.memory_mb))
    return entry.record.info(call.supervisor.now(), pausing=_pausing(entry)).model_copy(
        update={
            "disk_size_mb": size,
            "expires_at": call.supervisor.retention.ends_at(entry),
        }
    )


async def list_snapshots(call: Call) -> Answer:
    """Newest first."""
    query: SnapshotsQuery = call.query
    name = None if query.name is None else normalised(query.name, "list")
    of = None if query.sandbox_id is None else query.sandbox_id.partition("-")[0]
    rows = [
        Row(id=each.id, starts=(micros(each.created_at),), item=each)
        for each in call.supervisor.saved.all()
        if of in (None, each.sandbox_id) and name in (None, each.name, each.reference)
    ]
    items, token = page(rows, limit=query.limit, order=None, token=query.next_token, now=call.supervisor.now())
    return Answer(
        content=[shown(call.supervisor, each) for each in items], headers={"X-Next-Token": token} if token else {}
    )


def shown(supervisor: Supervisor, snapshot: Snapshot) -> SnapshotInfo:
    """A snapshot as the wire shows it."""
    names = supervisor.saved.names(snapshot)
    return SnapshotInfo(snapshot_id=snapshot.reference, names=names, size_bytes=snapshot.size)


async def figures(call: Call) -> Answer:
    """The engine's own, for Prometheus."""
    text, kind = await asyncio.to_thread(call.engine.figures.page)
    return Answer(content=text, headers={"Content-Type": kind})


async def metrics(call: Call) -> Answer:
    """The samples of one sandbox."""
    query: MetricsQuery = call.query
    samples = await call.supervisor.metering.samples(call.supervisor.entry(call.sandbox_id))
    start, end = _micros(query.start), _micros(query.end)
    return Answer(
        content=[
            _metric(sample)
            for sample in samples
            if (start is None or micros(sample.at) >= start) and (end is None or micros(sample.at) <= end)
        ]
    )


async def many_metrics(call: Call) -> Answer:
    """The last sample of each."""
    query: ManyMetricsQuery = call.query
    ids = [each.partition("-")[0] for each in query.sandbox_ids.split(",")]
    if len(ids) > _MOST_IDS:
        msg = f"validation error: sandbox_ids: {len(ids)} ids. Ask for {_MOST_IDS} at most."
        raise ConfigError(msg, op="metrics")

    found = {}
    for sandbox_id in ids:
        try:
            samples = await call.supervisor.metering.samples(call.supervisor.entry(sandbox_id))
        except NotFoundError:
            continue
        if samples:
            found[sandbox_id] = _metric(samples[-1])
    return Answer(content=ManyMetrics(sandboxes=found))


async def logs(call: Call) -> Answer:
    """The first version: from a moment on, oldest first."""
    query: LogsQuery = call.query
    lines = _lines(call)
    if query.start is not None:
        lines = [line for line in lines if _millis(line.at) >= query.start]
    lines = lines[: query.limit]
    return Answer(
        content=Logs(
            logs=[LogLine(timestamp=line.at, line=line.message) for line in lines],
            log_entries=[_entry(line) for line in lines],
        )
    )


async def logs_v2(call: Call) -> Answer:
    """The second version: from a cursor on in either direction, filtered."""
    query: LogsV2Query = call.query
    backward = query.direction == "backward"
    lines = _lines(call)
    if query.cursor is not None:
        cursor = query.cursor
        lines = [line for line in lines if (_millis(line.at) <= cursor if backward else _millis(line.at) >= cursor)]
    if query.level is not None:
        lines = [line for line in lines if LEVELS.index(line.level) >= LEVELS.index(query.level)]
    lines = [line for line in lines if query.search in line.message]
    if backward:
        lines.reverse()
    return Answer(content=LogsV2(logs=[_entry(line) for line in lines[: query.limit]]))


def _lines(call: Call) -> list[Line]:
    return call.supervisor.journal.lines(call.supervisor.entry(call.sandbox_id).record.id)


def _entry(line: Line) -> LogEntry:
    return LogEntry(timestamp=line.at, message=line.message, level=line.level, fields=line.fields)


def _metric(sample: Sample) -> Metric:
    return Metric(
        timestamp=sample.at,
        timestamp_unix=int(sample.at.timestamp()),
        cpu_count=sample.cpu_count,
        cpu_used_pct=sample.cpu_used_pct,
        mem_used=sample.memory_used,
        mem_total=sample.memory_total,
        mem_cache=sample.cache,
        disk_used=sample.disk_used,
        disk_total=sample.disk_total,
        mem_used_mi_b=sample.memory_used >> 20,
        mem_total_mi_b=sample.memory_total >> 20,
    )


def _micros(moment: int | None) -> int | None:
    if moment is None:
        return None
    return moment * (1000 if moment >= _MILLISECONDS else 10**6)


def _millis(moment: datetime) -> int:
    return micros(moment) // 1000


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="health",
        method="GET",
        path="/health",
        summary="Whether the engine can create",
        handler=health,
        answers={200: str},
        open=True,
    ),
    Operation(
        name="listRunning",
        method="GET",
        path="/sandboxes",
        summary="List what runs",
        handler=list_running,
        query=Filter,
        answers={200: list[SandboxInfo]},
    ),
    Operation(
        name="list",
        method="GET",
        path="/v2/sandboxes",
        summary="List what runs and what is paused",
        handler=list_all,
        query=ListQuery,
        answers={200: list[SandboxInfo]},
        headers={**_NEXT, "X-Total-Running": "How many of the listing run; only where those are asked for"},
    ),
    Operation(
        name="info",
        method="GET",
        path="/sandboxes/{sandboxID}",
        summary="One sandbox",
        handler=info,
        answers={200: Detail},
        errors=(404,),
    ),
    Operation(
        name="listSnapshots",
        method="GET",
        path="/snapshots",
        summary="List snapshots",
        handler=list_snapshots,
        query=SnapshotsQuery,
        answers={200: list[SnapshotInfo]},
        headers=_NEXT,
    ),
    Operation(
        name="manyMetrics",
        method="GET",
        path="/sandboxes/metrics",
        summary="What several sandboxes take now",
        handler=many_metrics,
        query=ManyMetricsQuery,
        answers={200: ManyMetrics},
    ),
    Operation(
        name="metrics",
        method="GET",
        path="/sandboxes/{sandboxID}/metrics",
        summary="What a sandbox took in the last hour that it ran",
        handler=metrics,
        query=MetricsQuery,
        answers={200: list[Metric]},
        errors=(404,),
    ),
    Operation(
        name="figures",
        method="GET",
        path="/metrics",
        summary="The engine's own figures, as Prometheus scrapes them",
        handler=figures,
        answers={200: str},
        extension=True,
    ),
    Operation(
        name="logs",
        method="GET",
        path="/sandboxes/{sandboxID}/logs",
        summary="What happened to a sandbox",
        handler=logs,
        query=LogsQuery,
        answers={200: Logs},
        errors=(404,),
    ),
    Operation(
        name="logsV2",
        method="GET",
        path="/v2/sandboxes/{sandboxID}/logs",
        summary="What happened to a sandbox",
        handler=logs_v2,
        query=LogsV2Query,
        answers={200: LogsV2},
        errors=(404,),
    ),
)
