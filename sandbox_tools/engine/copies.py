"""More sandboxes out of one that runs on: snapshots that are kept, and forks."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sandbox_tools.engine.entry import Entry
from sandbox_tools.engine.images.saved import Origin, Snapshot, normalised
from sandbox_tools.engine.records import copied, new_id
from sandbox_tools.engine.supervisor import Supervisor, checked
from sandbox_tools.errors import ConfigError, SandboxError

# A restore fills a core: more at a time would only make each of them later.
_AT_A_TIME = 4


async def snapshot(supervisor: Supervisor, sandbox_id: str, *, name: str | None, memory: bool) -> Snapshot:
    """A snapshot of a sandbox that runs on, to make any number of others from.

    Args:
        name: Leads to the newest snapshot that has it. None: its id alone names it.
        memory: Without, sandboxes made from it begin with its files only.

    Raises:
        NotFoundError: There is no such sandbox.
        ConflictError: It is paused.
        ConfigError: The name can't be one, or is a template's.
        EngineError: It could not be written; nothing of it is left.
    """
    full = None if name is None else normalised(name, "snapshot")
    if full is not None and full.partition(":")[0] in supervisor.transitions.names.every():
        msg = f"{name!r} is the name of a template. Choose another."
        raise ConfigError(msg, op="snapshot")

    return await supervisor.carry_out(_snapshot(supervisor, supervisor.entry(sandbox_id), full, memory))


async def fork(
    supervisor: Supervisor, sandbox_id: str, *, count: int, timeout: int | None
) -> list[Entry | SandboxError]:
    """Copies of a running sandbox, memory and all, each with an id and tokens of its own; it runs on.

    Returns:
        For each copy the sandbox, or why there is none.

    Raises:
        NotFoundError: There is no such sandbox.
        ConflictError: It is paused.
        ConfigError: More copies than may run.
        EngineError: It could not be written, so that there is no copy at all.
    """
    seconds = checked(timeout, "fork")
    most = supervisor.sandboxes.most
    if most is not None and count >= most:
        msg = f"`count` is {count}, and {most} sandboxes may run at a time. Ask for fewer."
        raise ConfigError(msg, op="fork")

    return await supervisor.carry_out(_fork(supervisor, supervisor.entry(sandbox_id), count, seconds))


async def clone(
    supervisor: Supervisor, sandbox_id: str, *, count: int, timeout: int | None, strict: bool
) -> list[Entry]:
    """As `fork`, in PPIO's manner: only the copies that there are, one at least.

    Args:
        strict: All copies or none.
    """
    outcomes = await fork(supervisor, sandbox_id, count=count, timeout=timeout)
    copies = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, SandboxError)]
    if failures and (strict or not copies):
        await asyncio.gather(*(supervisor.kill(copy.record.id) for copy in copies), return_exceptions=True)
        raise failures[0]
    return copies


async def _snapshot(supervisor: Supervisor, entry: Entry, name: str | None, memory: bool) -> Snapshot:
    async with supervisor.transitions.standing(entry, "snapshot"):
        record = entry.record
        taken = Snapshot(
            id=new_id(),
            name=name,
            sandbox_id=record.id,
            template=record.template,
            runsc=record.runsc,
            memory_mb=record.memory_mb,
            memory=memory,
            cpu=record.cpu,
            disk_mb=record.disk_mb,
            created_at=supervisor.now(),
        )
        final = supervisor.saved.path(taken.id)
        manifest = await supervisor.lifecycle.write_image(entry, final, taken.model_dump_json())
        taken = taken.model_copy(update={"size": manifest.size})
        supervisor.saved.add(taken)
        supervisor.journal.note(record.id, f"snapshot {taken.reference} taken", snapshot=taken.reference)
        return taken


async def _fork(supervisor: Supervisor, entry: Entry, count: int, seconds: int) -> list[Entry | SandboxError]:
    async with _image(supervisor, entry) as origin:
        free = asyncio.Semaphore(_AT_A_TIME)

        async def copy() -> Entry | SandboxError:
            async with free:
                record = copied(entry.record, now=supervisor.now(), timeout=seconds)
                try:
                    return await supervisor.transitions.begin(record, origin, None)
                except SandboxError as error:
                    return error

        outcomes = await asyncio.gather(*(copy() for _ in range(count)))
        supervisor.journal.note(entry.record.id, f"forked {count} times")
        return list(outcomes)


@asynccontextmanager
async def _image(supervisor: Supervisor, entry: Entry) -> AsyncIterator[Origin]:
    """An image that is there for a while; without a description, so that it is swept if a crash leaves it."""
    path = supervisor.saved.path(new_id())
    try:
        async with supervisor.transitions.standing(entry, "fork"):
            record = entry.record
            await supervisor.lifecycle.write_image(entry, path)
        yield Origin(
            name=record.template_name,
            template=record.template,
            runsc=record.runsc,
            memory_mb=record.memory_mb,
            image=path,
        )
    finally:
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
