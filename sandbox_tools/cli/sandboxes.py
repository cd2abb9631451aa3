"""Commands on sandboxes from outside: what there are, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from sandbox_tools.cli.common import as_json, console, extra, named, on_sandboxes, progress, say, show
from sandbox_tools.errors import SandboxError
from sandbox_tools.policy.report import span

if TYPE_CHECKING:
    from rich.table import Table

    from sandbox_tools.client import Client
    from sandbox_tools.models import SandboxInfo

OURS = "sandbox_tools."
"""What the sessions' own metadata begins with."""


@click.command()
@click.option("--state", type=click.Choice(("running", "paused")), help="Only these.")
@click.option("--watch", is_flag=True, help="Go on showing, until Ctrl-C.")
@click.option("--every", type=click.FloatRange(0.1), default=2.0, show_default=True, metavar="SECONDS")
@as_json
@on_sandboxes
async def ps(client: Client, state: Any, watch: bool, every: float, as_json: bool) -> None:
    """List sandboxes: what each does, since when, until when, and what it holds."""

    async def rows() -> list[SandboxInfo]:
        return [info async for info in client.list(state=state)]

    if as_json:
        if watch:
            msg = "`--watch` is for people, `--json` for scripts. Leave one out."
            raise click.UsageError(msg)
        show(await rows())
    elif not watch:
        console().print(_table(await rows()))
    else:
        with extra("cli"):
            from rich.live import Live
        with Live(_table(await rows()), console=console(), auto_refresh=False) as live:
            while True:
                await asyncio.sleep(every)
                live.update(_table(await rows()), refresh=True)


def _table(rows: Sequence[SandboxInfo]) -> Table:
    with extra("cli"):
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

    now = datetime.now(UTC)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("SANDBOX", "STATE", "FOR", "NEXT", "HOLDS", "OWNER", "THREAD"):
        table.add_column(name, no_wrap=name == "SANDBOX")
    colours = {"running": "green", "frozen": "cyan", "paused": "blue"}
    for info in rows:
        doing = "frozen" if info.frozen_since else info.state
        since = info.frozen_since or (info.end_at if info.state == "paused" else info.started_at)
        table.add_row(
            info.sandbox_id,
            f"[{colours[doing]}]{doing}[/]",
            _span(now - since),
            _next(info, now),
            _holds(info),
            info.metadata.get(f"{OURS}owner", ""),
            info.metadata.get(f"{OURS}thread", ""),
        )
    return table


def _next(info: SandboxInfo, now: datetime) -> str:
    if info.state == "running":
        what = info.lifecycle.on_timeout if info.lifecycle else "end"
        return f"{what} in {_span(info.end_at - now)}"
    return f"deleted in {_span(info.expires_at - now)}" if info.expires_at else ""


def _holds(info: SandboxInfo) -> str:
    if info.state == "running":
        return "" if info.resident_bytes is None else f"{info.resident_bytes / 1e6:.0f} MB of RAM"
    return "" if info.snapshot_bytes is None else f"{info.snapshot_bytes / 1e6:.0f} MB on disk"


def _span(time: timedelta) -> str:
    return span(max(0.0, time.total_seconds()))


Verb = Callable[[str], Awaitable[bool]]


async def _each(
    client: Client, names: Sequence[str], words: tuple[str, str, str], verb: Verb, *, as_json: bool
) -> int | None:
    """Do it to each, say what came of it, and go on where one fails.

    Args:
        words: What is being done, what it is then, and what it was already where `verb` gives False.
    """
    doing, done, already = words
    outcomes: list[dict[str, Any]] = []
    with progress(quiet=as_json) as bars:
        for name in names:
            task = bars.add_task(f"{doing} {name}", total=None)
            try:
                sandbox_id = (await named(client, name)).sandbox_id
                outcomes.append({"sandbox_id": sandbox_id, "outcome": done if await verb(sandbox_id) else already})
            except SandboxError as error:
                outcomes.append({"sandbox_id": name, "error": error.message})
            bars.remove_task(task)
    if as_json:
        show(outcomes)
    else:
        for outcome in outcomes:
            if "error" in outcome:
                say(f"sandbox-tools: {outcome['error']}")
            else:
                click.echo(f"{outcome['sandbox_id']} {outcome['outcome']}")
    return 1 if any("error" in outcome for outcome in outcomes) else None


ids = click.argument("ids", nargs=-1, required=True, metavar="SANDBOX...")


@click.command()
@ids
@click.option("--files-only", is_flag=True, help="Keep no memory: processes end.")
@as_json
@on_sandboxes
async def pause(client: Client, ids: tuple[str, ...], files_only: bool, as_json: bool) -> int | None:
    """Put sandboxes on disk, memory and processes included; SANDBOX is an id or the beginning of one."""
    words = ("pausing", "paused", "was paused already")
    return await _each(client, ids, words, lambda each: client.pause(each, memory=not files_only), as_json=as_json)


@click.command()
@ids
@click.option("--timeout", type=click.IntRange(1), default=300, show_default=True, metavar="SECONDS")
@as_json
@on_sandboxes
async def resume(client: Client, ids: tuple[str, ...], timeout: int, as_json: bool) -> int | None:
    """Wake sandboxes for at least SECONDS."""

    async def connect(sandbox_id: str) -> bool:
        asleep = (await client.info(sandbox_id)).state == "paused"
        await client.connect(sandbox_id, timeout=timeout)
        return asleep

    return await _each(client, ids, ("waking", "resumed", "ran already"), connect, as_json=as_json)


@click.command()
@ids
@as_json
@on_sandboxes
async def rm(client: Client, ids: tuple[str, ...], as_json: bool) -> int | None:
    """End sandboxes, running or paused, with all that is in them."""
    return await _each(client, ids, ("ending", "ended", "was gone already"), client.kill, as_json=as_json)


@click.command()
@click.argument("sandbox")
@click.option("--limit", type=click.IntRange(1, 1000), default=1000, show_default=True)
@as_json
@on_sandboxes
async def logs(client: Client, sandbox: str, limit: int, as_json: bool) -> None:
    """Show what happened to a sandbox, oldest first."""
    lines = await client.logs((await named(client, sandbox)).sandbox_id, limit=limit)
    if as_json:
        show(lines)
    else:
        for line in lines:
            click.echo(f"{line.timestamp:%Y-%m-%d %H:%M:%S}  {line.level:<5}  {line.message}")


@click.command()
@click.option("--older-than", type=click.FloatRange(0), default=30.0, show_default=True, metavar="DAYS")
@click.option("--owner", help="Only this one's.")
@click.option("--dry-run", is_flag=True, help="Only say which.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
@on_sandboxes
async def prune(
    client: Client, older_than: float, owner: str | None, dry_run: bool, yes: bool, as_json: bool
) -> int | None:
    """End what has been paused for longer than DAYS."""
    last = datetime.now(UTC) - timedelta(days=older_than)
    marks = {f"{OURS}owner": owner} if owner is not None else None
    old = [info async for info in client.list(state="paused", metadata=marks) if info.end_at <= last]
    if dry_run or not old:
        if as_json:
            show(old)
        else:
            console().print(_table(old)) if old else say("Nothing has been paused for so long.")
        return None
    if not yes:
        console().print(_table(old))
        click.confirm(f"End these {len(old)} sandboxes, with all that is in them?", abort=True, err=True)

    async def kill(sandbox_id: str) -> bool:
        # Somebody may have woken it while this was asked.
        info = await client.info(sandbox_id)
        return info.state == "paused" and info.end_at <= last and await client.kill(sandbox_id)

    names = [info.sandbox_id for info in old]
    return await _each(client, names, ("ending", "ended", "is in use and was left"), kill, as_json=as_json)
