"""The command line: parses, calls, prints; what it does lives in the engine."""

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
from sandbox_tools.paths import state_directory, templates_directory


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
    serve.add_argument("--memory-mb", type=int, default=2048, metavar="MB", help="memory of a sandbox (default: 2048)")

    savings = add("savings", _savings, "Tell what sandboxes have cost, and what pausing them has saved.")
    savings.add_argument(
        "--by", choices=("all", "owner", "thread", "sandbox"), default="owner", help="(default: owner)"
    )
    savings.add_argument("--owner", metavar="NAME", help="only this one's sandboxes")
    savings.add_argument(
        "--bindings",
        metavar="PLACE",
        help="a file, or postgresql://...: where the sessions keep theirs (default: the configured provider's file)",
    )
    savings.add_argument("--json", action="store_true", help="print seconds, dollars and counts as JSON")
    savings.add_argument("--png", type=Path, metavar="FILE", help="draw it as well")
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

        msg = f"The local engine needs the package {error.name!r}. Install it: pip install 'sandbox-tools[local]'"
        raise ConfigError(msg) from error


def _savings(arguments: argparse.Namespace) -> int:
    from sandbox_tools.savings import as_json, plot, read, table

    place = arguments.bindings
    if place is None:
        from sandbox_tools.client import Client
        from sandbox_tools.session.sessions import default_bindings

        place = _state(arguments) / default_bindings(Client()).name
    rows = asyncio.run(read(place, by=arguments.by, owner=arguments.owner))
    if arguments.json:
        print(json.dumps(as_json(rows), indent=1))
    else:
        with _local_extra():
            from rich.console import Console

            Console().print(table(rows))
    if arguments.png:
        plot(rows, arguments.png)
    return 0


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
    )


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
