"""Which way of reading an image is the quickest: from the page cache, and from a disk that has to be read.

Bare `runsc restore` reads the same image as it is, with `-direct`, after the kernel was told to read ahead, and from a
copy in memory; beside it are resumes by engines of the benchmark's own, which seal and which do not. Each way is
measured with the files in the page cache and with the files dropped from it, turn about, in one run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engine import FILL, FIRST, LET_GO, Bare, an_engine, seconds
from benchmarks.figures import Samples, machine, milliseconds, options, ratio
from sandbox_tools import Client
from sandbox_tools.engine.images.memory import Memory
from sandbox_tools.engine.templates import Template, prepare
from sandbox_tools.paths import state_directory, templates_directory

# MB that a sandbox holds besides what it is born with, some 120.
SIZES = (0, 1024)

PLAIN, DIRECT, AHEAD, COPY = (
    "runsc restore",
    "the same, -direct",
    "the same, read ahead",
    "the same, of a copy in memory",
)
SEALED, UNSEALED = "resume", "resume of what is not sealed"
READ = "reading the files alone"

Cached = dict[bool, Samples]
"""Samples of each way, by whether the files were in the page cache."""


def drop(directory: Path) -> None:
    """Have none of its files in the page cache."""
    for file in directory.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(directory: Path) -> None:
    """Have all of its files there."""
    room = bytearray(1 << 20)
    for file in directory.iterdir():
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(room):
                pass


def read_ahead(directory: Path) -> None:
    """Tell the kernel that all of it will be needed; of one long piece it reads the beginning only."""
    for file in directory.iterdir():
        with file.open("rb") as opened:
            for at in range(0, file.stat().st_size, 1 << 20):
                os.posix_fadvise(opened.fileno(), at, 1 << 20, os.POSIX_FADV_WILLNEED)


class Images:
    """One image, on the disk and in memory, and all the ways to restore it."""

    def __init__(self, template: Template, work: Path, memory: Path, name: str) -> None:
        self.template = template
        self.work = work
        self.name = name
        self.disk = work / f"{name}-image"
        self.copy = memory / name
        self.restores = 0

    async def make(self, mb: int) -> None:
        first = Bare(self.template, self.work, self.name)
        first.make_ready()
        try:
            await first.restore(self.template.image)
            await first.run(FILL.format(mb=mb) if mb else FIRST)
            first.tunnel.detach("checkpoint")
            # Not into memory: that would count as the sandbox's, and end it.
            await first.checkpoint(self.disk)
        finally:
            await first.end()
        shutil.copytree(self.disk, self.copy)

    async def time(self, way: str) -> float:
        """Seconds that it takes."""
        if way == READ:
            return await seconds(partial(asyncio.to_thread, read, self.disk))
        self.restores += 1
        second = Bare(self.template, self.work, f"{self.name}-{self.restores}")
        second.make_ready()

        async def restored() -> None:
            ahead = asyncio.ensure_future(asyncio.to_thread(read_ahead, self.disk)) if way == AHEAD else None
            await second.restore(self.copy if way == COPY else self.disk, *(("-direct",) if way == DIRECT else ()))
            await second.run("1+1")
            if ahead is not None:
                await ahead

        try:
            return await seconds(restored)
        finally:
            await second.end()


async def resumes(client: Client, state: Path, mb: int, rounds: int, way: str, into: Cached) -> None:
    """An engine's, of one sandbox again and again."""
    sandbox = await client.create("base")
    await sandbox.run_code(FILL.format(mb=mb) if mb else FIRST)

    async def resume() -> None:
        await sandbox.resume()
        await sandbox.run_code("1+1")

    for cached in (True, False) * rounds:
        await sandbox.pause()
        await asyncio.sleep(LET_GO)
        (snapshot,) = (state / "snapshots" / sandbox.id).iterdir()
        (read if cached else drop)(snapshot)
        into[cached].setdefault(way, []).append(await seconds(resume))
    await sandbox.kill()


async def measure(rounds: int, console: Console) -> dict[str, Cached]:
    state = state_directory()
    templates = templates_directory(state)
    os.environ.setdefault("SANDBOX_TOOLS_TEMPLATES_DIR", str(templates))
    results: dict[str, Cached] = {}
    async with contextlib.AsyncExitStack() as ending:
        template = await prepare(state, templates)
        work = Path(tempfile.mkdtemp(prefix="cold-", dir=state))
        ending.callback(shutil.rmtree, work, ignore_errors=True)
        memory = Memory.of(work)
        ending.callback(memory.stop)
        progress = ending.enter_context(Progress(console=console, transient=True))
        task = progress.add_task("rounds", total=len(SIZES) * (rounds + 2))
        engines = {}
        for way, more in ((SEALED, ()), (UNSEALED, ("--no-encryption",))):
            own = work / ("plain" if more else "sealed")
            engines[way] = own, await ending.enter_async_context(an_engine(own, "--pool", "0", *more, ending=ending))
        for mb in SIZES:
            into = results[str(mb)] = {True: {}, False: {}}
            images = Images(template, work, memory.path, f"i{mb}")
            await images.make(mb)
            for _ in range(rounds):
                progress.update(task, advance=1, description=f"bare, holding {mb} MB more")
                for cached in (True, False):
                    for way in (READ, PLAIN, DIRECT, AHEAD, COPY):
                        (read if cached else drop)(images.disk)
                        into[cached].setdefault(way, []).append(await images.time(way))
            shutil.rmtree(images.disk)
            shutil.rmtree(images.copy)
            for way, (own, client) in engines.items():
                progress.update(task, advance=1, description=f"engines, holding {mb} MB more")
                await resumes(client, own, mb, rounds, way, into)
    return results


def show(results: dict[str, Cached], console: Console) -> None:
    for mb, into in results.items():
        title = f"to the first result of a sandbox that holds {mb} MB besides what it is born with, ms"
        table = Table(title=title, title_justify="left")
        for column in ("", "in the page cache, p50", "p95", "ratio", "on the disk only, p50", "p95", "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        limit = into[True][PLAIN]
        for way, samples in into[True].items():
            cold = into[False][way]
            table.add_row(way, *milliseconds(samples), ratio(samples, limit), *milliseconds(cold), ratio(cold, limit))
        console.print(table)
    console.print(machine())


def main() -> None:
    arguments = options(__doc__, rounds=5).parse_args()
    console = Console(file=sys.stdout)
    results = asyncio.run(measure(arguments.rounds, console))
    show(results, console)
    if arguments.json:
        named = {mb: {"cached": into[True], "dropped": into[False]} for mb, into in results.items()}
        arguments.json.write_text(json.dumps(named, indent=1))


if __name__ == "__main__":
    main()
