"""Commands about this machine: its engine, the MCP server, what they need."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sandbox_tools.cli.common import as_json, extra, progress, say, show, state_dir
from sandbox_tools.errors import ConfigError
from sandbox_tools.paths import templates_directory

key_file = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The keys that snapshots are sealed with; made where it is missing.  [default: snapshot.key in the state "
    "directory, unless SANDBOX_TOOLS_SNAPSHOT_KEY has them or SANDBOX_TOOLS_SNAPSHOT_KEY_COMMAND prints them]",
)


@click.command()
@click.option(
    "--uds",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Listen on this Unix socket.  [default: in the state directory]",
)
@click.option("--host", metavar="ADDRESS", help="Listen on TCP at this address instead.")
@click.option("--port", type=int, metavar="N", help="Its port.  [default: a free one; address: 127.0.0.1]")
@click.option(
    "--tls-port",
    type=int,
    metavar="N",
    help="Listen with TLS as well, certified by an authority made in the state directory; 0: a free port.",
)
@click.option(
    "--domain",
    metavar="NAME",
    help="What create and connect answer as the sandboxes' domain.  [default on TCP: sbx@ADDRESS:PORT, with TLS]",
)
@click.option("--max-sandboxes", type=int, metavar="N", help="Running sandboxes at most.  [default: no limit]")
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="SANDBOX_TOOLS_API_KEY",
    help="What clients must send; on TCP one is generated where none is given.  [env: SANDBOX_TOOLS_API_KEY]",
)
@click.option(
    "--idle-exit",
    type=float,
    metavar="SECONDS",
    help="Exit after so long without a running sandbox or a request; paused ones lie on disk.  [default: never]",
)
@click.option(
    "--retention",
    "retention_days",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="DAYS",
    help="How long a paused sandbox is kept; 0: until it is killed.",
)
@click.option(
    "--encryption/--no-encryption",
    default=True,
    show_default="on",
    help="Seal snapshots on the disk; what is sealed already stays so.",
)
@key_file
@click.option(
    "--pool",
    "pool_size",
    type=click.IntRange(0, 100),
    default=1,
    show_default=True,
    metavar="N",
    help="Sandboxes kept ready, frozen, each some 110 MB of memory: the next create is a thaw.",
)
@click.option(
    "--max-snapshot-mb",
    type=click.IntRange(1),
    metavar="MB",
    help="What all snapshots together may take of the disk; kept pauses go first, then a pause is refused.  "
    "[default: what it has]",
)
@click.option(
    "--keep-history",
    type=click.IntRange(0, 100),
    default=0,
    show_default=True,
    metavar="N",
    help="Keep the last N pauses of each sandbox as snapshots, to go back to.",
)
@click.option("--memory-mb", type=int, default=2048, show_default=True, metavar="MB", help="Memory of a sandbox.")
@click.option(
    "--disk-mb",
    type=click.IntRange(0, 1 << 30),
    metavar="MB",
    help="What a sandbox may write to its files at most, in whole GiB, 8 at least beside 2 GB of memory; 0: as much as "
    "there is.  [default: as its template says, or 10240]",
)
@click.option(
    "--cpus",
    type=click.FloatRange(0.01),
    metavar="N",
    help="Cores' worth of CPU time of a sandbox; needs root.  [default: as many as there are]",
)
@click.option(
    "--allow-internet",
    is_flag=True,
    help="Let new sandboxes reach the internet, through an HTTP proxy, unless created not to.  [default: no way out]",
)
@state_dir
def serve(
    state_dir: Path, uds: Path | None, host: str | None, port: int | None, tls_port: int | None, **options: Any
) -> int:
    """Run the engine in the foreground."""
    tcp = any(each is not None for each in (host, port, tls_port))
    if tcp and uds:
        msg = "An engine listens on a Unix socket or on TCP, not on both. Leave out `--uds`, or the rest."
        raise ConfigError(msg, op="serve")
    with extra("local"):
        from sandbox_tools.engine import serve as engine

    where = (host or "127.0.0.1") if tcp else None
    return engine.run(state_dir, uds=uds, host=where, port=port or 0, tls_port=tls_port, **options)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def mcp(words: tuple[str, ...]) -> int:
    """Serve the tools to MCP clients, over stdio or HTTP; `mcp --help` tells the options."""
    from sandbox_tools.mcp import main

    return main(words, prog="sandbox-tools mcp")


@click.command()
@as_json
@state_dir
def setup(state_dir: Path, as_json: bool) -> None:
    """Make this machine ready: runsc, the root file system, the warmed template."""
    with extra("local"):
        from sandbox_tools.engine import templates
        from sandbox_tools.engine.building.install import check_machine, install_runsc, make_directory
        from sandbox_tools.engine.building.roots import build_root

    started = time.monotonic()
    templates_dir = templates_directory(state_dir)
    check_machine()
    make_directory(state_dir)
    with stages(quiet=as_json) as stage:
        stage("runsc")("Looking for runsc", 0.0)
        runsc = install_runsc(state_dir)
        root = build_root(templates_dir, stage("root file system"))
        template = asyncio.run(templates.prepare(state_dir, templates_dir, stage("warmed template")))
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        outcome = {"runsc": str(runsc.path), "version": runsc.version, "root": str(root), "template": template.id}
        show(outcome | {"seconds": seconds})
    else:
        click.echo(f"Ready: runsc {runsc.version}, template {template.id} in {templates_dir} ({seconds} s)")


@click.command()
@click.option("--provider", help="Look at this one's key and address.  [default: whose key the environment has]")
@click.option("--api-url", metavar="URL", help="Where its control plane is, if elsewhere.")
@as_json
@state_dir
def doctor(state_dir: Path, as_json: bool, provider: str | None, api_url: str | None) -> int:
    """Say what is there, what is missing, and what to do about it; exit code 1 if something is missing."""
    from sandbox_tools.cli.reach import look
    from sandbox_tools.engine.doctor import examine

    remote = asyncio.run(look(provider, api_url))
    findings = remote if remote is not None else examine(state_dir)
    if as_json:
        show([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.words}")
    return 0 if all(finding.ok for finding in findings) else 1


@click.group()
def key() -> None:
    """The keys that this machine's snapshots are sealed with."""


@key.command()
@key_file
@as_json
@state_dir
def rotate(state_dir: Path, key_file: Path | None, as_json: bool) -> int | None:
    """Make a new key, put every snapshot under it and forget the old ones; the engine must be stopped."""
    with extra("local"):
        from sandbox_tools.engine.images import rotation

    with progress(quiet=as_json) as bars:
        task = bars.add_task("snapshots", total=None)
        outcome = rotation.rotate(state_dir, key_file, lambda done, of: bars.update(task, completed=done, total=of))
    if as_json:
        show(asdict(outcome))
    else:
        click.echo(f"Key {outcome.key_id} is the only one now, and {outcome.moved} snapshots are under it.")
        for each in outcome.lost:
            say(f"sandbox-tools: The snapshot {each} is under a key that is not here, and can't be resumed without it.")
    return 1 if outcome.lost else None


Stage = Callable[[str], Callable[[str, float], None]]
"""Begins a named stage; gives what it reports to: words on what is done now, and the share done (0 to 1)."""


@contextmanager
def stages(*, quiet: bool) -> Iterator[Stage]:
    """Bars on a terminal, a line a step elsewhere, nothing where `quiet`."""
    if quiet:
        yield lambda _: lambda words, share: None
        return

    if not sys.stderr.isatty():
        said = ""

        def tell(line: str) -> None:
            nonlocal said
            if line != said:
                click.echo(line, err=True)
            said = line

        yield lambda name: lambda words, share: tell(f"{name}: {words}")
        return

    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.fields[name]:<18}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with progress(*columns) as bars:
        running: list[Any] = []

        def finish() -> None:
            for task in running:
                bars.update(task, completed=1.0, description="")
            running.clear()

        def stage(name: str) -> Callable[[str, float], None]:
            finish()
            task = bars.add_task("", total=1.0, name=name)
            running.append(task)
            return lambda words, share: bars.update(task, completed=share, description=words)

        yield stage
        finish()
