"""What this package's client costs beside bare httpx and E2B's own: the same calls to the same server, turn about.

The server is a process on loopback whose answers are ready-made. Every client is a process of its own, E2B's in the
environment of the SDK tests; each has its turn with the same step before the next step begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.figures import Samples, machine, milliseconds, options
from tests.sdk.environments import environment

HERE = Path(__file__).parent
CALLS = 30
STEPS = ("run_code", "list", "pause", "create", "connect", "info", "set_timeout", "kill")
STREAMS = 1000
PATIENCE = 120.0

OURS, BARE, VENDOR = "sandbox_tools", "httpx", "e2b"
TITLES = {
    BARE: "beside bare httpx that sends the same and reads the JSON (run_code and create: a new connection each), ms",
    VENDOR: "beside the async client of e2b 2.63 (list: 100 rows; it keeps run_code's connection, ours does not), ms",
}
TARGETS = {BARE: dict.fromkeys(STEPS, 1.15), VENDOR: {"run_code": 1.0, "list": 1.0, "pause": 1.0}}
IMPORTS = {
    "import httpx": OURS,
    "import sandbox_tools": OURS,
    "from sandbox_tools import Client": OURS,
    "import e2b_code_interpreter": VENDOR,
}
IMPORT_TARGET = 120
MEMORY_TARGET = 300

FRAMEWORKS = ("langchain", "langchain_core", "langgraph", "deepagents", "mcp", "fastapi", "starlette", "uvicorn")
LOADED = f"import sandbox_tools.client, sys; print(*(name for name in {FRAMEWORKS} if name in sys.modules))"


class Contestant:
    """One client, in its own process.

    Args:
        python: The interpreter of its environment.
        process: Reads orders and writes samples.
    """

    def __init__(self, python: Path, process: asyncio.subprocess.Process) -> None:
        self.python = python
        self.process = process
        self.rounds: dict[str, list[list[float]]] = {step: [] for step in STEPS}

    async def obey(self, step: str, calls: int) -> list[float]:
        """Its samples."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([step, calls]).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)
        samples: list[float] = json.loads(line)
        return samples


@contextlib.asynccontextmanager
async def child(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that lives as long as this is open."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def contestants() -> AsyncIterator[dict[str, Contestant]]:
    """All three, at one server."""
    vendor = await asyncio.to_thread(environment, "e2b") / "bin" / "python"
    pythons = {OURS: Path(sys.executable), BARE: Path(sys.executable), VENDOR: vendor}
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(child(sys.executable, str(HERE / "loopback.py")))
        assert server.stdout
        url = f"http://127.0.0.1:{int(await server.stdout.readline())}"
        os.environ["E2B_SANDBOX_URL"] = url
        script = str(HERE / "contestant.py")
        yield {
            name: Contestant(python, await stack.enter_async_context(child(str(python), script, name, url)))
            for name, python in pythons.items()
        }


def start(python: Path, code: str) -> float:
    """Seconds that a fresh interpreter takes for some code, from its start to its end."""
    started = time.perf_counter()
    subprocess.run([str(python), "-c", code], check=True)
    return time.perf_counter() - started


def imports(pythons: dict[str, Path], rounds: int) -> Samples:
    """Seconds above those of the same interpreter that imports nothing."""
    samples: Samples = {statement: [] for statement in IMPORTS}
    for _ in range(rounds):
        for statement, name in IMPORTS.items():
            samples[statement].append(start(pythons[name], statement) - start(pythons[name], "pass"))
    return samples


async def measure(rounds: int, console: Console) -> dict[str, dict[str, list[list[float]]]]:
    """The samples: of each client by step and round, of imports, and the megabytes of the streams."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("calls", total=rounds)
        async with contestants() as all_three:
            for number in range(rounds):
                names = list(all_three)
                for step in STEPS:
                    for name in names[number % 3 :] + names[: number % 3]:
                        all_three[name].rounds[step].append(await all_three[name].obey(step, CALLS))
                progress.advance(task)
        async with contestants() as unused:
            progress.update(task, description="streams")
            streams = {name: [await one.obey("streams", STREAMS)] for name, one in unused.items()}
        progress.update(task, description="imports")
        pythons = {name: one.python for name, one in all_three.items()}
        started = {what: [seconds] for what, seconds in (await asyncio.to_thread(imports, pythons, rounds)).items()}
    return {name: one.rounds for name, one in all_three.items()} | {"streams": streams, "imports": started}


def verdict(figure: float, target: float | None) -> str:
    """Whether a target is met."""
    return "" if target is None else f"{target:g} {'met' if figure <= target else 'MISSED'}"


def show(results: dict[str, dict[str, list[list[float]]]], console: Console) -> None:
    for other, title in TITLES.items():
        table = Table(title=title, title_justify="left")
        for column in ("p50 of", "ours", "p95", "other", "p95", "ratio", "rounds", "target"):
            table.add_column(column, justify="left" if column == "p50 of" else "right", no_wrap=True)
        for step in STEPS:
            ours, theirs = results[OURS][step], results[other][step]
            # Neighbours in time are compared, so that what else the machine does concerns both.
            ratios = [statistics.median(mine) / statistics.median(its) for mine, its in zip(ours, theirs, strict=True)]
            middle = statistics.median(ratios)
            figures = (figure for rounds in (ours, theirs) for figure in milliseconds([*chain(*rounds)], 2))
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
            table.add_row(step, *figures, f"{middle:.2f}", spread, verdict(middle, TARGETS[other].get(step)))
        console.print(table)

    table = Table(title="a fresh interpreter, above one that imports nothing, ms", title_justify="left")
    for column in ("import", "p50", "p95", "target"):
        table.add_column(column, justify="left" if column == "import" else "right")
    for statement, (seconds,) in results["imports"].items():
        target = IMPORT_TARGET if "sandbox_tools" in statement else None
        table.add_row(statement, *milliseconds(seconds, 0), verdict(1000 * statistics.median(seconds), target))
    console.print(table)
    loaded = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout.split()
    console.print(f"frameworks that the client imports: {', '.join(loaded) or 'none'}")

    table = Table(title=f"{STREAMS} run_code streams, all open at once, in one process, MB", title_justify="left")
    for column in ("client", "before", "at most", "target"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for name, ((before, most),) in results["streams"].items():
        target = MEMORY_TARGET if name == OURS else None
        table.add_row(name, f"{before:.0f}", f"{most:.0f}", verdict(most, target))
    console.print(table)
    console.print(machine())


def main() -> None:
    arguments = options(__doc__, rounds=15)
    console = Console(file=sys.stdout)
    results = asyncio.run(measure(arguments.rounds, console))
    show(results, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
