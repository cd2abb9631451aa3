"""What the commands share: whom they ask, how they name a sandbox, and how they show things."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from sandbox_tools.errors import ConfigError, NotFoundError
from sandbox_tools.paths import state_directory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sandbox_tools.client import Client
    from sandbox_tools.models import SandboxInfo

state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    callback=lambda _context, _option, chosen: chosen.absolute() if chosen else state_directory(),
    help="Where this machine keeps its sandboxes.  [default: XDG state]",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, and no progress.")


def on_sandboxes(command: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., int | None]:
    """A command that has a `Client` as its first argument."""

    @click.option("--provider", help="Whose sandboxes.  [default: whose key the environment has, else this machine]")
    @click.option("--api-url", metavar="URL", help="Where its control plane is, if elsewhere.")
    @state_dir
    @functools.wraps(command)
    def wrapped(provider: str | None, api_url: str | None, state_dir: Path, **options: Any) -> int | None:
        from sandbox_tools.client import Client

        async def work() -> int | None:
            async with Client(provider=provider, api_url=api_url, state_dir=state_dir, on_wait=say) as client:
                return await command(client, **options)

        return asyncio.run(work())

    return wrapped


async def named(client: Client, name: str) -> SandboxInfo:
    """The sandbox of that id, or the only one whose id begins so.

    Raises:
        ConfigError: There is none, or there are several.
    """
    try:
        return await client.info(name)
    except NotFoundError:
        found = [info async for info in client.list() if info.sandbox_id.startswith(name)]
    if len(found) != 1:
        many = f"begins the ids of {len(found)} sandboxes" if found else "is no sandbox's id, nor begins one"
        msg = f"{name!r} {many}. `sandbox-tools ps` lists them."
        raise ConfigError(msg)
    return found[0]


def say(words: str) -> None:
    """A line for people, beside the output."""
    click.echo(words, err=True)


def show(value: Any) -> None:
    """Plain data, models among it, as JSON."""

    def plain(each: Any) -> Any:
        return each.model_dump(mode="json", exclude_none=True) if isinstance(each, BaseModel) else str(each)

    click.echo(json.dumps(value, indent=2, default=plain))


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing optional package into the words that install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sandbox_tools"):
            raise
        msg = f"This command needs the package {error.name!r}. Install it: pip install 'sandbox-tools[{name}]'"
        raise ConfigError(msg) from error


def console() -> Console:
    """Where tables go; as wide as its content where it is no terminal."""
    with extra("cli"):
        from rich.console import Console
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)


@contextmanager
def progress(*columns: Any, quiet: bool = False) -> Iterator[Progress]:
    """Bars on standard error, where that is a terminal.

    Args:
        columns: What is beside them. None given: a spinner, words and the time.
    """
    with extra("cli"):
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = columns or (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    silent = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=silent) as bars:
        yield bars
