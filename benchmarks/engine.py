"""What the engine costs beside bare `runsc`: the same steps on the same images, turn about, in one run.

The bare side is `runsc` called by hand, with the guest spoken to through its pipes: no engine, no HTTP server, nothing
synced to disk. The other side is this package's own client and an engine process of the benchmark's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.figures import Samples, machine, milliseconds, options, ratio
from sandbox_tools import Client
from sandbox_tools.engine.bundle import write_bundle
from sandbox_tools.engine.http1 import call
from sandbox_tools.engine.runtime import Container
from sandbox_tools.engine.templates import Template, prepare
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.engine.usage import cpu_seconds
from sandbox_tools.models import DEFAULT_TEMPLATE, INTERPRETER_PORT
from sandbox_tools.paths import socket_path, state_directory, templates_directory

FIRST = "import pandas; int(pandas.DataFrame({'a': [20, 22]}).a.sum())"
FILL = "import os; blob = [os.urandom(1 << 20) for _ in range(1024)]; len(blob)"
ROUND_TRIPS = 30

CREATE = "create to first result"
ROUND_TRIP = "1+1 round trip"
PAUSE = "pause"
RESUME = "resume to first result"
FREEZE = "freeze"
THAW = "thaw to first result"
STEPS = (CREATE, ROUND_TRIP, FREEZE, THAW, PAUSE, RESUME)

# How often each is frozen, and for how many seconds an idle one is watched.
FREEZES, WATCHED = 10, 20.0


class Bare:
    """One container, by `runsc` alone."""

    def __init__(self, template: Template, work: Path, name: str) -> None:
        self.template = template
        self.container = Container(id=name, directory=work / name, binary=template.runsc)
        self.state = work / "runsc"
        self.tunnel = Tunnel(self.container.pipes)

    def call(self, verb: str, *arguments: str, **streams: int) -> None:
        flags = [f"--root={self.state}", "--network=none", f"--overlay2=root:dir={self.container.filestore}"]
        prefix = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount", "--net", "--"]
        flags += [] if os.geteuid() == 0 else ["--ignore-cgroups"]
        argv = [*prefix, str(self.template.runsc), *flags, verb, *arguments, self.container.id]
        subprocess.run(argv, check=True, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams})

    def make_ready(self) -> None:
        """What is there before the clock starts: bundle and pipes."""
        self.container.filestore.mkdir(parents=True)
        write_bundle(self.container.bundle, self.template.config(self.container))
        self.container.pipes.make()
        self.tunnel.open_pipes()

    async def restore(self, image: Path) -> None:
        with self.container.pipes.handed() as (stdin, stdout):
            options = ("--detach", f"--bundle={self.container.bundle}", f"--image-path={image}")
            await asyncio.to_thread(self.call, "restore", *options, stdin=stdin, stdout=stdout)
        await self.tunnel.attach()

    async def checkpoint(self, image: Path) -> None:
        image.mkdir()
        await asyncio.to_thread(self.call, "checkpoint", "--compression=none", f"--image-path={image}")

    async def freeze(self) -> None:
        await asyncio.to_thread(self.call, "pause")

    async def thaw(self) -> None:
        await asyncio.to_thread(self.call, "resume")
        await self.run("1+1")

    async def run(self, code: str) -> None:
        body = json.dumps({"code": code, "context_id": None, "language": None, "env_vars": None}).encode()
        status, answer = await call(
            self.tunnel, INTERPRETER_PORT, "POST", "/execute", headers={"Content-Type": "application/json"}, body=body
        )
        assert status == 200, answer
        assert b'"error"' not in answer, answer

    async def end(self) -> None:
        self.tunnel.detach("done")
        await asyncio.to_thread(self.call, "delete", "-force")
        shutil.rmtree(self.container.directory)


async def seconds(step: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await step()
    return time.perf_counter() - started


async def bare_round(template: Template, work: Path, name: str, fill: str | None, into: Samples) -> None:
    first, second = Bare(template, work, f"{name}-1"), Bare(template, work, f"{name}-2")
    first.make_ready()
    second.make_ready()
    image = work / f"{name}-image"

    async def create() -> None:
        await first.restore(template.image)
        await first.run(FIRST)

    async def resume() -> None:
        await second.restore(image)
        await second.run("1+1")

    into[CREATE].append(await seconds(create))
    into[ROUND_TRIP] += [await seconds(lambda: first.run("1+1")) for _ in range(ROUND_TRIPS)]
    if fill:
        await first.run(fill)
    for _ in range(FREEZES):
        into[FREEZE].append(await seconds(first.freeze))
        into[THAW].append(await seconds(first.thaw))
    first.tunnel.detach("checkpoint")
    into[PAUSE].append(await seconds(lambda: first.checkpoint(image)))
    into[RESUME].append(await seconds(resume))
    await second.end()
    await first.end()
    shutil.rmtree(image)


async def engine_round(client: Client, fill: str | None, into: Samples) -> None:
    started = time.perf_counter()
    sandbox = await client.create("base")
    await sandbox.run_code(FIRST)
    into[CREATE].append(time.perf_counter() - started)
    into[ROUND_TRIP] += [await seconds(lambda: sandbox.run_code("1+1")) for _ in range(ROUND_TRIPS)]
    if fill:
        await sandbox.run_code(fill)
    for _ in range(FREEZES):
        into[FREEZE].append(await seconds(sandbox.freeze))
        into[THAW].append(await seconds(lambda: sandbox.run_code("1+1")))

    async def resume() -> None:
        await sandbox.resume()
        await sandbox.run_code("1+1")

    into[PAUSE].append(await seconds(sandbox.pause))
    into[RESUME].append(await seconds(resume))
    await sandbox.kill()


async def idle_cpu(client: Client, state: Path) -> Samples:
    """CPU seconds a second that a sandbox takes of the host while nobody uses it."""
    sandbox = await client.create(DEFAULT_TEMPLATE)
    await sandbox.run_code(FIRST)
    pid = int(next((state / "sandboxes" / sandbox.id).glob("run-*/pid")).read_text())
    taken: Samples = {}
    for name, step in {"running": asyncio.sleep(2), "frozen": sandbox.freeze()}.items():
        await step
        before = cpu_seconds(pid)
        await asyncio.sleep(WATCHED)
        taken[name] = [(cpu_seconds(pid) - before) / WATCHED]
    await sandbox.kill()
    return taken


async def measure(rounds: int, console: Console) -> tuple[dict[str, dict[str, Samples]], Samples]:
    state = state_directory()
    with Progress(console=console, transient=True) as progress:
        template = await prepare(state, templates_directory(state))
        work = Path(tempfile.mkdtemp(prefix="bench-", dir=state))
        kinds = {"default sandbox": None, "holding 1 GB": FILL}
        task = progress.add_task("rounds", total=rounds * len(kinds))
        results: dict[str, dict[str, Samples]] = {}
        os.environ.setdefault("SANDBOX_TOOLS_TEMPLATES_DIR", str(templates_directory(state)))
        os.environ.setdefault("SANDBOX_TOOLS_RUNSC", str(template.runsc))
        try:
            async with Client(provider="local", state_dir=work / "engine") as client:
                # Both sides warm: the engine is up, the image is in the page cache.
                await (await client.create("base")).kill()
                for kind, fill in kinds.items():
                    sides: dict[str, Samples] = {side: {step: [] for step in STEPS} for side in ("engine", "bare")}
                    for number in range(rounds):
                        progress.update(task, description=kind)
                        await engine_round(client, fill, sides["engine"])
                        await bare_round(template, work, f"bare-{number}-{len(results)}", fill, sides["bare"])
                        progress.advance(task)
                    results[kind] = sides
                progress.update(task, description="idle")
                cpu = await idle_cpu(client, work / "engine")
        finally:
            end_engine(work / "engine")
            shutil.rmtree(work, ignore_errors=True)
    return results, cpu


def end_engine(state: Path) -> None:
    """The process that listens on the engine's socket, if one does."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(OSError):
        listener.connect(str(socket_path(state)))
        pid, _, _ = struct.unpack("3i", listener.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        os.kill(pid, signal.SIGTERM)


def show(results: dict[str, dict[str, Samples]], cpu: Samples, console: Console) -> None:
    for kind, sides in results.items():
        table = Table(title=f"{kind}, ms", title_justify="left")
        for column in ("step", "engine p50", "p95", "bare runsc p50", "p95", "ratio of p50"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for step, ours in sides["engine"].items():
            bare = sides["bare"][step]
            table.add_row(step, *milliseconds(ours), *milliseconds(bare), ratio(ours, bare))
        console.print(table)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, (share,) in cpu.items())
    console.print(f"CPU of an idle sandbox, of one core: {shares}")
    console.print(machine())


def main() -> None:
    arguments = options(__doc__, rounds=5).parse_args()
    console = Console(file=sys.stdout)
    results, cpu = asyncio.run(measure(arguments.rounds, console))
    show(results, cpu, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({**results, "idle CPU": cpu}, indent=1))


if __name__ == "__main__":
    main()
