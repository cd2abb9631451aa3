"""Commands inside a sandbox: code, a shell, files."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sandbox_tools.cli.common import as_json, extra, named, on_sandboxes, progress, say, show
from sandbox_tools.errors import ConfigError, ExecutionTimeoutError

if TYPE_CHECKING:
    from sandbox_tools.client import Client, Sandbox

FAILED = 4
"""The exit code of `run` where the code itself failed."""

PIECE = 256 * 1024


@click.command()
@click.argument("file", type=click.File("r"))
@click.option("--sandbox", metavar="ID", help="Run in this one.  [default: a new one, which ends with it]")
@click.option("--keep", is_flag=True, help="Pause the new one afterwards, and say its id.")
@click.option("--language", help="[default: Python]")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, metavar="SECONDS")
@as_json
@on_sandboxes
async def run(
    client: Client, file: Any, sandbox: str | None, keep: bool, language: str | None, timeout: float, as_json: bool
) -> int | None:
    """Run FILE, or `-` for standard input; what it puts out comes as it is put out."""
    from sandbox_tools.models import Stderr, Stdout

    code = await asyncio.to_thread(file.read)

    def on_event(event: Any) -> None:
        if isinstance(event, (Stdout, Stderr)) and not as_json:
            click.echo(event.text, nl=False, err=isinstance(event, Stderr))

    box = await _sandbox(client, sandbox) if sandbox else await client.create()
    try:
        done = await box.run_code(code, language=language, timeout=timeout, on_event=on_event)
        if keep and not sandbox:
            await box.pause()
            say(f"Paused as {box.id}")
    except ExecutionTimeoutError as error:
        say(f"sandbox-tools: {error.message}")
        return FAILED
    finally:
        if not keep and not sandbox:
            await asyncio.shield(box.kill())
    if as_json:
        show({"sandbox_id": box.id if keep or sandbox else None, **done.model_dump(mode="json", exclude_none=True)})
    else:
        if done.failure is not None:
            say(done.failure.traceback or f"{done.failure.name}: {done.failure.value}")
        for result in done.results:
            if result.text:
                click.echo(result.text)
    return FAILED if done.failure is not None else None


@click.command()
@click.argument("sandbox")
@click.option("--user", help="Who you are in it.  [default: user]")
@on_sandboxes
async def shell(client: Client, sandbox: str, user: str | None) -> int | None:
    """Open a shell in a sandbox, which it wakes and keeps awake; its exit code is the shell's."""
    from sandbox_tools.cli.terminal import attach

    if not sys.stdin.isatty() or not sys.stdout.isatty():
        msg = "A shell needs a terminal. Use `run` for code that comes from elsewhere."
        raise ConfigError(msg)
    return await attach(await _sandbox(client, sandbox), user=user)


@click.command()
@click.argument("source")
@click.argument("target")
@as_json
@on_sandboxes
async def cp(client: Client, source: str, target: str, as_json: bool) -> None:
    """Copy a file into a sandbox or out of it: one of SOURCE and TARGET is ID:PATH."""
    inward, outward = _split(target), _split(source)
    if (inward is None) == (outward is None):
        msg = "One of the two is a file of this machine, the other ID:PATH. To copy between sandboxes, copy twice."
        raise click.UsageError(msg)
    if inward:
        sandbox, path = await _sandbox(client, inward[0]), inward[1]
        local = Path(source)
        if not await asyncio.to_thread(local.is_file):
            msg = f"There is no file {source!r}; of a directory make an archive first."
            raise ConfigError(msg)
        size = local.stat().st_size
        with _bar(source, size, quiet=as_json) as advance:
            written = await sandbox.files.write(path or local.name, _pieces(local, advance))
        facts = {"path": written.path, "bytes": size}
    else:
        assert outward is not None
        sandbox, path = await _sandbox(client, outward[0]), outward[1]
        local = Path(target)
        local = local / Path(path).name if await asyncio.to_thread(local.is_dir) else local
        info = await sandbox.files.info(path)
        # Beside it until it is whole: nobody takes half a file for all of it.
        part = local.with_name(f".{local.name}.part")
        try:
            with _bar(path, info.size, quiet=as_json) as advance:
                with part.open("wb") as file:
                    async with aclosing(sandbox.files.stream(path)) as pieces:
                        async for piece in pieces:
                            await asyncio.to_thread(file.write, piece)
                            advance(len(piece))
            part.replace(local)
        finally:
            part.unlink(missing_ok=True)
        facts = {"path": str(local), "bytes": local.stat().st_size}
    if as_json:
        show(facts)
    else:
        click.echo(f"{facts['path']}: {facts['bytes']} bytes")


async def _sandbox(client: Client, name: str) -> Sandbox:
    return await client.connect((await named(client, name)).sandbox_id)


def _split(place: str) -> tuple[str, str] | None:
    """ID and PATH. None: it is a file of this machine, as whatever has a slash before its first colon."""
    sandbox, colon, path = place.partition(":")
    return (sandbox, path) if colon and sandbox and "/" not in sandbox else None


@contextmanager
def _bar(name: str, size: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Gives what takes how many bytes more have been moved."""
    with extra("cli"):
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with progress(*columns, quiet=quiet) as bars:
        task = bars.add_task(name, total=size)
        yield lambda moved: bars.advance(task, moved)


async def _pieces(path: Path, advance: Callable[[int], None]) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, PIECE):
            yield piece
            advance(len(piece))
