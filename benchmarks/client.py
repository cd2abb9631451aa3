"""What this package's client costs beside bare httpx and E2B's own: the same calls to the same server, turn about.

The server is a process on loopback whose answers are ready-made. Every client is a process of its own, E2B's in the
environment of the SDK tests; each has its turn with the same step before the next step begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
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
CALLS = 10
STARTS = 15
STREAMS = 1000
PATIENCE = 120.0

OURS, BARE, VENDOR = "sandbox_tools", "httpx", "e2b"
STEPS = ("run_code", "list", "pause", "create", "connect", "info", "set_timeout", "kill")
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

Turn = tuple[list[float], float]
"""The seconds that each call took, and what they took of the CPU on average."""
Turns = dict[str, dict[str, list[Turn]]]
"""By client and step."""
Starts = dict[str, list[tuple[float, float]]]
"""By statement: seconds above those of an interpreter that imports nothing, and those of the CPU."""
Rows = dict[str, tuple[str, str, float | None]]
"""By label: a step, whom it is compared with, and the ratio that it may have at most."""

TABLES: dict[str, Rows] = {
    "beside bare httpx that sends the same and reads the JSON; both open a connection for each create": {
        step: (step, BARE, 1.15) for step in STEPS
    },
    "beside the async client of e2b 2.63, which keeps all its connections; list: 100 rows": {
        step: (step, VENDOR, 1.0 if step in ("run_code", "list", "pause") else None) for step in STEPS
    },
}


class Contestant:
    """One client, in its own process.

    Args:
        python: The interpreter of its environment.
        process: Reads orders and writes samples.
    """

    def __init__(self, python: Path, process: asyncio.subprocess.Process) -> None:
        self.python = python
        self.process = process
        self.turns: dict[str, list[Turn]] = {step: [] for step in STEPS}

    async def obey(self, step: str, calls: int) -> Turn:
        """What it measured."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([step, calls]).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)
        first, second = json.loads(line)
        return first, second


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
    """All of them, at one server."""
    ours, vendor = Path(sys.executable), await asyncio.to_thread(environment, "e2b") / "bin" / "python"
    pythons = {OURS: ours, BARE: ours, VENDOR: vendor}
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


def start(python: Path, code: str) -> tuple[float, float]:
    """Seconds that a fresh interpreter takes for some code, from its start to its end, and those of the CPU."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(python), "-c", code], check=True)
    taken, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports(pythons: dict[str, Path]) -> Starts:
    """What each takes above the same interpreter that imports nothing."""
    samples: Starts = {statement: [] for statement in IMPORTS}
    for _ in range(STARTS):
        for statement, name in IMPORTS.items():
            (taken, spent), (idly, idle) = start(pythons[name], statement), start(pythons[name], "pass")
            samples[statement].append((taken - idly, spent - idle))
    return samples


async def measure(rounds: int, console: Console) -> tuple[Turns, Starts, Samples]:
    """The turns of each client by step, the starts by statement, and the megabytes of the streams."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("calls", total=rounds)
        async with contestants() as these:
            names = list(these)
            for number in range(rounds):
                first = number % len(names)
                for step in STEPS:
                    for name in names[first:] + names[:first]:
                        these[name].turns[step].append(await these[name].obey(step, CALLS))
                progress.advance(task)
        progress.update(task, description="imports")
        starts = await asyncio.to_thread(imports, {name: one.python for name, one in these.items()})
        progress.update(task, description="streams")
        async with contestants() as unused:
            # The server ends none before all are open, so an answer says that they were.
            streams = {name: [*map(float, await unused[name].obey("streams", STREAMS))] for name in names[:3]}
    return {name: one.turns for name, one in these.items()}, starts, streams


def verdict(figure: float, target: float | None) -> str:
    """Whether a target is met."""
    return "" if target is None else f"{target:g} {'met' if figure <= target else 'MISSED'}"


def compared(title: str, rows: Rows, turns: Turns) -> Table:
    """The two sides of some steps."""
    table = Table(title=title, title_justify="left")
    for column in ("ms", "ours", "p95", "other", "p95", "ratio", "half of rounds", "of CPU", "at most"):
        table.add_column(column, justify="left" if column == "ms" else "right", no_wrap=True)
    for label, (step, other, target) in rows.items():
        sides = turns[OURS][step], turns[other][step]
        ours, theirs = ([*chain.from_iterable(seconds for seconds, _ in side)] for side in sides)
        ratio = statistics.median(ours) / statistics.median(theirs)
        # Neighbours in time, so that what else the machine does concerns both.
        pairs = [*zip(*sides, strict=True)]
        ratios = sorted(statistics.median(a) / statistics.median(b) for (a, _), (b, _) in pairs)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        spent = statistics.median(a / b for (_, a), (_, b) in pairs)
        figures = (*milliseconds(ours, 2), *milliseconds(theirs, 2), f"{ratio:.2f}", f"{low:.2f}-{high:.2f}")
        table.add_row(label, *figures, f"{spent:.2f}", verdict(ratio, target))
    return table


def show(turns: Turns, starts: Starts, streams: Samples, console: Console) -> None:
    for title, rows in TABLES.items():
        console.print(compared(title, rows, turns))

    table = Table(title="a fresh interpreter, above one that imports nothing, ms", title_justify="left")
    for column in ("statement", "p50", "p95", "CPU p50", "at most"):
        table.add_column(column, justify="left" if column == "statement" else "right")
    for statement, samples in starts.items():
        taken, spent = ([*column] for column in zip(*samples, strict=True))
        target = IMPORT_TARGET if "sandbox_tools" in statement else None
        figures = (*milliseconds(taken, 0), milliseconds(spent, 0)[0])
        table.add_row(statement, *figures, verdict(1000 * statistics.median(taken), target))
    console.print(table)
    loaded = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout.split()
    console.print(f"frameworks that the client imports: {', '.join(loaded) or 'none'}")

    table = Table(title=f"{STREAMS} run_code streams, all open at once, MB of the process", title_justify="left")
    for column in ("client", "before", "peak", "at most"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for name, (before, peak) in streams.items():
        target = MEMORY_TARGET if name == OURS else None
        table.add_row(name, f"{before:.0f}", f"{peak:.0f}", verdict(peak, target))
    console.print(table)
    console.print(machine())


def main() -> None:
    arguments = options(__doc__, rounds=40).parse_args()
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 110
    turns, starts, streams = asyncio.run(measure(arguments.rounds, console))
    show(turns, starts, streams, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"turns": turns, "starts": starts, "streams": streams}, indent=1))


if __name__ == "__main__":
    main()
