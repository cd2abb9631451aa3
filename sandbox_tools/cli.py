"""The command line: parses, calls, prints; what it does lives in the engine, the bindings and the policy."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandbox_tools.errors import ConfigError, SandboxError
from sandbox_tools.mcp import add_options as mcp_options
from sandbox_tools.mcp import run as run_mcp
from sandbox_tools.paths import state_directory, templates_directory
from sandbox_tools.policy.savings import SUMMED, Ledger


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. 1 is a failure told in words, 2 a wrong command line.

    Args:
        argv: Words after the program's name. None: those of this process.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except SandboxError as error:
        print(f"sandbox-tools: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sandbox-tools", description="Computers for AI agents that wait.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        added.add_argument(
            "--state-dir", type=Path, metavar="DIR", help="where this machine keeps its sandboxes (default: XDG state)"
        )
        return added

    setup = add("setup", _setup, "Make this machine ready: runsc, the root file system, the warmed template.")
    setup.add_argument("--json", action="store_true", help="print the outcome as JSON, and no progress")

    doctor = add("doctor", _doctor, "Say what is there, what is missing, and what to do about it.")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    serve = add("serve", _serve, "Run the engine in the foreground.")
    serve.add_argument(
        "--uds", type=Path, metavar="PATH", help="listen on this Unix socket (default: in the state directory)"
    )
    serve.add_argument("--host", metavar="ADDRESS", help="listen on TCP at this address instead")
    serve.add_argument("--port", type=int, metavar="N", help="its port (default: a free one; address: 127.0.0.1)")
    serve.add_argument(
        "--tls-port",
        type=int,
        metavar="N",
        help="listen with TLS as well, certified by an authority made in the state directory (0: a free port)",
    )
    serve.add_argument(
        "--domain",
        metavar="NAME",
        help="what create and connect answer as the sandboxes' domain (default on TCP: sbx@ADDRESS:PORT, with TLS)",
    )
    serve.add_argument("--max-sandboxes", type=int, metavar="N", help="running sandboxes at most (default: no limit)")
    serve.add_argument(
        "--api-key",
        default=os.environ.get("SANDBOX_TOOLS_API_KEY"),
        metavar="KEY",
        help="what clients must send; on TCP one is generated where none is given (default: $SANDBOX_TOOLS_API_KEY)",
    )
    serve.add_argument(
        "--idle-exit",
        type=float,
        metavar="SECONDS",
        help="exit after so long without a running sandbox or a request; paused ones lie on disk (default: never)",
    )
    serve.add_argument(
        "--retention",
        type=float,
        default=30.0,
        metavar="DAYS",
        help="how long a paused sandbox is kept (default: 30; 0: until it is killed)",
    )
    serve.add_argument("--memory-mb", type=int, default=2048, metavar="MB", help="memory of a sandbox (default: 2048)")

    mcp = add("mcp", _mcp, "Serve the tools to MCP clients, over stdio or HTTP.")
    mcp_options(mcp)

    savings = add("savings", _savings, "Show what sandboxes cost, and what they would have without pauses.")
    savings.add_argument(
        "--bindings",
        action="append",
        metavar="PLACE",
        help="an SQLite file, or postgresql://...; may be repeated (default: all files in the state directory)",
    )
    savings.add_argument("--owner", help="only of this one")
    savings.add_argument("--by", choices=("sandbox", "thread", "owner"), default="owner", help="(default: owner)")
    savings.add_argument("--png", type=Path, metavar="FILE", help="draw a plot here (needs the extra `plot`)")
    savings.add_argument("--json", action="store_true", help="print seconds and dollars as JSON")
    return parser


def _state(arguments: argparse.Namespace) -> Path:
    chosen: Path | None = arguments.state_dir
    return chosen.absolute() if chosen else state_directory()


@contextmanager
def _local_extra() -> Iterator[None]:
    """Turn a missing optional package into the words that install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sandbox_tools"):
            raise

        msg = f"This command needs the package {error.name!r}. Install it: pip install 'sandbox-tools[local]'"
        raise ConfigError(msg) from error


def _setup(arguments: argparse.Namespace) -> int:
    with _local_extra():
        from sandbox_tools.engine import templates
        from sandbox_tools.engine.install import check_machine, install_runsc, make_directory
        from sandbox_tools.engine.roots import build_root

    started = time.monotonic()
    state = _state(arguments)
    templates_dir = templates_directory(state)
    check_machine()
    make_directory(state)
    with _progress(quiet=arguments.json) as stage:
        stage("runsc")("Looking for runsc", 0.0)
        runsc = install_runsc(state)
        root = build_root(templates_dir, stage("root file system"))
        template = asyncio.run(templates.prepare(state, templates_dir, stage("warmed template")))
    seconds = round(time.monotonic() - started, 1)

    if arguments.json:
        outcome = {"runsc": str(runsc.path), "version": runsc.version, "root": str(root), "template": template.id}
        outcome["seconds"] = seconds
        print(json.dumps(outcome))
    else:
        print(f"Ready: runsc {runsc.version}, template {template.id} in {templates_dir} ({seconds} s)")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from sandbox_tools.engine.doctor import examine

    findings = examine(_state(arguments))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.words}")
    return 0 if all(finding.ok for finding in findings) else 1


def _serve(arguments: argparse.Namespace) -> int:
    tcp = any(each is not None for each in (arguments.host, arguments.port, arguments.tls_port))
    if tcp and arguments.uds:
        msg = "An engine listens on a Unix socket or on TCP, not on both. Leave out `--uds`, or the rest."
        raise ConfigError(msg, op="serve")

    with _local_extra():
        from sandbox_tools.engine import serve

    return serve.run(
        _state(arguments),
        uds=arguments.uds,
        host=(arguments.host or "127.0.0.1") if tcp else None,
        port=arguments.port or 0,
        tls_port=arguments.tls_port,
        domain=arguments.domain,
        max_sandboxes=arguments.max_sandboxes,
        api_key=arguments.api_key,
        idle_exit=arguments.idle_exit,
        memory_mb=arguments.memory_mb,
        retention_days=arguments.retention,
    )


def _mcp(arguments: argparse.Namespace) -> int:
    if arguments.state_dir is not None:
        os.environ["SANDBOX_TOOLS_STATE_DIR"] = str(_state(arguments))
    run_mcp(arguments)
    return 0


def _savings(arguments: argparse.Namespace) -> int:
    from sandbox_tools.policy import report
    from sandbox_tools.policy.savings import grouped

    state = _state(arguments)
    places = arguments.bindings or sorted(map(str, state.glob("sessions*.db")))
    ledger = asyncio.run(_accounts(places, arguments.owner))
    if not ledger:
        words = f"of the owner {arguments.owner!r} " if arguments.owner else ""
        msg = f"No sandbox {words}is on record in {', '.join(places) or str(state)}."
        raise ConfigError(msg, op="savings")

    groups = grouped(ledger, arguments.by, time.time())
    if arguments.json:
        keys = ("owner", "thread", "sandbox")
        rows = [
            dict(zip(keys, group, strict=False))
            | {name: getattr(account, name) for name in SUMMED}
            | {f"saved_against_{name}": getattr(account, name) - account.spent for name in ("timer", "always_on")}
            for group, account in sorted(groups.items())
        ]
        print(json.dumps(rows, indent=2))
    else:
        with _local_extra():
            from rich.console import Console
        Console().print(report.table(groups))
    if arguments.png:
        report.draw(groups, arguments.png)
    return 0


async def _accounts(places: Sequence[str], owner: str | None) -> Ledger:
    from sandbox_tools.session.bindings import Bindings, PostgresBindings, SqliteBindings

    found: Ledger = []
    for place in places:
        postgres = place.startswith(("postgres://", "postgresql://")) or "dbname=" in place
        if not postgres and not Path(place).is_file():
            msg = f"There is no file {place!r}. Name one that `SqliteBindings` has written."
            raise ConfigError(msg, op="savings")
        bindings: Bindings = PostgresBindings(place, connections=1) if postgres else SqliteBindings(place)
        try:
            found += await bindings.accounts(owner)
        finally:
            await bindings.aclose()
    return found


Stage = Callable[[str], Callable[[str, float], None]]
"""Begins a named stage; gives what it reports to: words on what is done now, and the share done (0 to 1)."""


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Stage]:
    """Bars on a terminal, a line a step elsewhere, nothing where `quiet`."""
    if quiet:
        yield lambda _: lambda words, share: None
        return

    if not sys.stderr.isatty():
        yield lambda name: lambda words, share: print(f"{name}: {words}", file=sys.stderr, flush=True)
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.fields[name]:<18}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        running: list[Any] = []

        def finish() -> None:
            for task in running:
                progress.update(task, completed=1.0, description="")
            running.clear()

        def stage(name: str) -> Callable[[str, float], None]:
            finish()
            task = progress.add_task("", total=1.0, name=name)
            running.append(task)
            return lambda words, share: progress.update(task, completed=share, description=words)

        yield stage
        finish()
