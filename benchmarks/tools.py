"""What the package adds to an agent's turn: a tool's call beside the client's own, and a turn's beginning and end."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
import uuid
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.figures import Samples, machine, milliseconds, options
from sandbox_tools import Client, PauseAfter, SandboxCallback, SandboxToolkit, Sessions
from sandbox_tools.session.bindings import SqliteBindings

CALLS = 20
CODE = "1+1"
TOOL, DIRECT, BEGIN, END = "run_code, the tool", "run_code, the client's", "a turn begins", "a turn ends"
TARGETS = {TOOL: 5.0, BEGIN: 2.0, END: 2.0}
"""Milliseconds at most, at the median; a tool's beyond those of the client's own call."""


async def measure(rounds: int, console: Console) -> Samples:
    """Seconds of each step, turn about."""
    samples: Samples = {TOOL: [], DIRECT: [], BEGIN: [], END: []}
    config = {"configurable": {"thread_id": "t"}}
    with tempfile.TemporaryDirectory() as work, Progress(console=console, transient=True) as progress:
        bindings = SqliteBindings(Path(work) / "sessions.db")
        client = Client(provider="local")
        async with client, Sessions(client, bindings=bindings, policy=PauseAfter(600)) as all_:
            session, callback = all_.session("t"), SandboxCallback(all_)
            run_code = SandboxToolkit(all_).get_tools()[0]
            task = progress.add_task("rounds", total=rounds)
            try:
                for _ in range(rounds):
                    await turns(callback, samples)
                    async with session.turn(), session.lease() as sandbox:
                        for _ in range(CALLS):
                            started = time.perf_counter()
                            await sandbox.run_code(CODE)
                            samples[DIRECT].append(time.perf_counter() - started)
                            started = time.perf_counter()
                            await run_code.ainvoke({"code": CODE}, config)
                            samples[TOOL].append(time.perf_counter() - started)
                    progress.advance(task)
            finally:
                await session.kill()
        await bindings.aclose()
    return samples


async def turns(callback: SandboxCallback, samples: Samples) -> None:
    """What a run waits for where its turn begins and ends; what that has posted is not its to wait for."""
    for _ in range(CALLS):
        run, metadata = uuid.uuid4(), {"thread_id": f"t{uuid.uuid4()}"}
        started = time.perf_counter()
        await callback.on_chain_start({}, {}, run_id=run, metadata=metadata)
        begun = time.perf_counter()
        await callback.on_chain_end({}, run_id=run)
        samples[END].append(time.perf_counter() - begun)
        samples[BEGIN].append(begun - started)
        await asyncio.sleep(0.002)


def show(samples: Samples, console: Console) -> None:
    table = Table(title="what the package adds to a turn, ms", title_justify="left")
    for column in ("step", "p50", "p95", "added, p50", "at most"):
        table.add_column(column, justify="left" if column == "step" else "right")
    direct = sorted(samples[DIRECT])[len(samples[DIRECT]) // 2]
    for step, values in samples.items():
        middle = sorted(values)[len(values) // 2]
        added = 1000 * (middle - direct if step == TOOL else middle)
        target = TARGETS.get(step)
        verdict = "" if target is None else f"{target:g} {'met' if added <= target else 'MISSED'}"
        table.add_row(step, *milliseconds(values, 2), "" if target is None else f"{added:.2f}", verdict)
    console.print(table)
    console.print(machine())


def main() -> None:
    arguments = options(__doc__, rounds=5).parse_args()
    console = Console(file=sys.stdout)
    samples = asyncio.run(measure(arguments.rounds, console))
    show(samples, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main()
