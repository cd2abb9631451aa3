"""Commands on copies of sandboxes: snapshots and forks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sandbox_tools.cli.common import as_json, named, on_sandboxes, progress, say, show
from sandbox_tools.errors import SandboxError

if TYPE_CHECKING:
    from sandbox_tools.client import Client
    from sandbox_tools.models import SnapshotInfo


@click.group()
def snapshot() -> None:
    """Keep a sandbox as it is now, to make others from."""


@snapshot.command()
@click.argument("sandbox")
@click.option("--name", help="Leads to the newest snapshot that has it.")
@as_json
@on_sandboxes
async def take(client: Client, sandbox: str, name: str | None, as_json: bool) -> None:
    """Take one of a running sandbox, which runs on; it outlives the sandbox."""
    with progress(quiet=as_json) as bars:
        bars.add_task(f"taking a snapshot of {sandbox}", total=None)
        taken = await client.snapshot((await named(client, sandbox)).sandbox_id, name=name)
    _tell([taken], as_json=as_json)


@snapshot.command()
@click.option("--of", metavar="SANDBOX", help="Only those that were taken of it.")
@as_json
@on_sandboxes
async def ls(client: Client, of: str | None, as_json: bool) -> None:
    """List snapshots, newest first."""
    _tell([each async for each in client.list_snapshots(sandbox_id=of)], as_json=as_json)


@snapshot.command("rm")
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...")
@as_json
@on_sandboxes
async def remove(client: Client, snapshots: tuple[str, ...], as_json: bool) -> int | None:
    """Delete snapshots; sandboxes made from them live on."""
    deleted = {each: await client.delete_snapshot(each) for each in snapshots}
    if as_json:
        show(deleted)
    else:
        for each, done in deleted.items():
            click.echo(f"{each} deleted") if done else say(f"sandbox-tools: There is no snapshot {each!r}.")
    return None if all(deleted.values()) else 1


def _tell(snapshots: list[SnapshotInfo], *, as_json: bool) -> None:
    if as_json:
        show(snapshots)
        return
    for each in snapshots:
        size = f"  {each.size_bytes / 1e6:.0f} MB" if each.size_bytes else ""
        click.echo(f"{each.snapshot_id}{size}  {' '.join(each.names)}".rstrip())


@click.command()
@click.argument("sandbox")
@click.option("--count", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option("--timeout", type=click.IntRange(1), default=300, show_default=True, metavar="SECONDS")
@as_json
@on_sandboxes
async def fork(client: Client, sandbox: str, count: int, timeout: int, as_json: bool) -> int | None:
    """Copy a running sandbox, memory and processes included; print the ids of the copies."""
    with progress(quiet=as_json) as bars:
        bars.add_task(f"copying {sandbox}", total=None)
        copies = await client.fork((await named(client, sandbox)).sandbox_id, count=count, timeout=timeout)
    failed = [each for each in copies if isinstance(each, SandboxError)]
    made = [each.id for each in copies if not isinstance(each, SandboxError)]
    if as_json:
        show({"sandbox_ids": made, "errors": [error.message for error in failed]})
    else:
        for sandbox_id in made:
            click.echo(sandbox_id)
        for error in failed:
            say(f"sandbox-tools: {error.message}")
    return 1 if failed else None
