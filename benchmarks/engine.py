"""What the engine costs beside bare `runsc`: the same steps on the same images, turn about, in one run.

The bare side is `runsc` called by hand, with the guest spoken to through its pipes: no engine, no HTTP server, nothing
synced to disk or sealed. The other sides are this package's own client and engines of the benchmark's own: as it comes,
with a sandbox kept ready, and with snapshots that are not sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.crowd import Engine
from benchmarks.figures import Samples, machine, milliseconds, options, ratio
from sandbox_tools import Client, Sandbox
from sandbox_tools.engine.bundle import write_bundle
from sandbox_tools.engine.http1 import call
from sandbox_tools.engine.runtime import Container
from sandbox_tools.engine.templates import Template, prepare
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.engine.usage import cpu_seconds
from sandbox_tools.models import DEFAULT_TEMPLATE, INTERPRETER_PORT
from sandbox_tools.paths import state_directory, templates_directory

FIRST = "import pandas; int(pandas.DataFrame({'a': [20, 22]}).a.sum())"
FILL = "import os; blob = [os.urandom(1 << 20) for _ in range({mb})]; len(blob)"
ROUND_TRIPS = 30

# MB that a sandbox holds besides what it is born with, some 120.
SIZES = (0, 256, 512, 1024)

CREATE, READY = "create to first result", "the same, one kept ready"
ROUND_TRIP = "1+1 round trip"
PAUSE, PLAIN_PAUSE = "pause until durable", "the same, not sealed"
RESUME, PLAIN_RESUME = "resume to first result", "resume of what is not sealed"
WRITE = "the same bytes, written and synced"
FREEZE = "freeze"
THAW = "thaw to first result"
STEPS = (CREATE, READY, ROUND_TRIP, FREEZE, THAW, PAUSE, PLAIN_PAUSE, RESUME, PLAIN_RESUME)

BARE = {READY: CREATE, PLAIN_PAUSE: PAUSE, PLAIN_RESUME: RESUME}
"""What stands beside a step that bare `runsc` knows under another name."""

# Seconds after a pause in which a gigabyte of memory is taken down; nobody resumes a sandbox at the moment it sleeps.
LET_GO = 0.5

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

    async def restore(self, image: Path, *more: str) -> None:
        with self.container.pipes.handed() as (stdin, stdout):
            options = ("--detach", f"--bundle={self.container.bundle}", f"--image-path={image}", *more)
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


async def bare_round(template: Template, work: Path, name: str, mb: int, into: Samples) -> None:
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
    if mb:
        await first.run(FILL.format(mb=mb))
    for _ in range(FREEZES):
        into[FREEZE].append(await seconds(first.freeze))
        into[THAW].append(await seconds(first.thaw))
    first.tunnel.detach("checkpoint")
    into[PAUSE].append(await seconds(lambda: first.checkpoint(image)))
    await asyncio.sleep(LET_GO)
    into[RESUME].append(await seconds(resume))
    await second.end()
    await first.end()
    size = sum(file.stat().st_size for file in image.iterdir())
    shutil.rmtree(image)
    into[WRITE].append(await asyncio.to_thread(write, work / f"{name}-bytes", size))


def write(path: Path, size: int) -> float:
    """Seconds that so many bytes take to be on the disk."""
    piece = os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(piece)
        os.fsync(file.fileno())
    took = time.perf_counter() - started
    path.unlink()
    return took


async def engine_round(client: Client, mb: int, into: Samples) -> None:
    started = time.perf_counter()
    sandbox = await client.create("base")
    await sandbox.run_code(FIRST)
    into[CREATE].append(time.perf_counter() - started)
    into[ROUND_TRIP] += [await seconds(lambda: sandbox.run_code("1+1")) for _ in range(ROUND_TRIPS)]
    if mb:
        await sandbox.run_code(FILL.format(mb=mb))
    for _ in range(FREEZES):
        into[FREEZE].append(await seconds(sandbox.freeze))
        into[THAW].append(await seconds(lambda: sandbox.run_code("1+1")))
    await pause_and_resume(sandbox, into[PAUSE], into[RESUME])


async def pause_and_resume(sandbox: Sandbox, pauses: list[float], resumes: list[float]) -> None:
    """To its end."""

    async def resume() -> None:
        await sandbox.resume()
        await sandbox.run_code("1+1")

    pauses.append(await seconds(sandbox.pause))
    await asyncio.sleep(LET_GO)
    resumes.append(await seconds(resume))
    await sandbox.kill()


async def plain_round(client: Client, mb: int, into: Samples) -> None:
    """An engine that seals nothing."""
    sandbox = await client.create("base")
    await sandbox.run_code(FILL.format(mb=mb) if mb else FIRST)
    await pause_and_resume(sandbox, into[PLAIN_PAUSE], into[PLAIN_RESUME])


async def ready_round(client: Client, state: Path, into: Samples) -> None:
    """An engine that keeps one ready, and has had the time to."""
    # Another process does it, and tells nobody.
    while not [pid for pid in (state / "sandboxes").glob("*/run-*/pid") if stands_still(pid)]:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    started = time.perf_counter()
    sandbox = await client.create("base")
    await sandbox.run_code(FIRST)
    into[READY].append(time.perf_counter() - started)
    await sandbox.kill()


def stands_still(pid: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return "\nState:\tT" in Path(f"/proc/{int(pid.read_text())}/status").read_text()
    return False


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
    os.environ.setdefault("SANDBOX_TOOLS_TEMPLATES_DIR", str(templates_directory(state)))
    with Progress(console=console, transient=True) as progress, contextlib.ExitStack() as ending:
        template = await prepare(state, templates_directory(state))
        os.environ.setdefault("SANDBOX_TOOLS_RUNSC", str(template.runsc))
        work = Path(tempfile.mkdtemp(prefix="bench-", dir=state))
        ending.callback(shutil.rmtree, work, ignore_errors=True)
        task = progress.add_task("rounds", total=rounds * len(SIZES))
        results: dict[str, dict[str, Samples]] = {}
        async with contextlib.AsyncExitStack() as clients:
            ours, ready, plain = [
                await clients.enter_async_context(an_engine(work / name, *options, ending=ending))
                for name, options in (
                    ("engine", ("--pool", "0")),
                    ("ready", ("--pool", "1")),
                    ("plain", ("--pool", "0", "--no-encryption")),
                )
            ]
            # Both sides warm: the image is in the page cache.
            await (await ours.create("base")).kill()
            for mb in SIZES:
                sides: dict[str, Samples] = {"engine": {step: [] for step in STEPS}, "bare": {}}
                sides["bare"] = {step: [] for step in (*STEPS, WRITE) if step not in BARE}
                for number in range(rounds):
                    progress.update(task, description=f"holding {mb} MB more")
                    await engine_round(ours, mb, sides["engine"])
                    await plain_round(plain, mb, sides["engine"])
                    if not mb:
                        await ready_round(ready, work / "ready", sides["engine"])
                    await bare_round(template, work, f"bare-{mb}-{number}", mb, sides["bare"])
                    progress.advance(task)
                results[str(mb)] = sides
            progress.update(task, description="idle")
            cpu = await idle_cpu(ours, work / "engine")
    return results, cpu


@contextlib.asynccontextmanager
async def an_engine(state: Path, *options: str, ending: contextlib.ExitStack) -> AsyncIterator[Client]:
    """A client of an engine that was started so."""
    state.mkdir()
    engine = await asyncio.to_thread(Engine, state, *options)
    ending.callback(engine.stop)
    async with Client(provider="local", state_dir=state) as client:
        yield client


def show(results: dict[str, dict[str, Samples]], cpu: Samples, console: Console) -> None:
    for mb, sides in results.items():
        table = Table(title=f"a sandbox that holds {mb} MB besides what it is born with, ms", title_justify="left")
        for column in ("step", "engine p50", "p95", "bare runsc p50", "p95", "ratio of p50"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for step, ours in sides["engine"].items():
            bare = sides["bare"][BARE.get(step, step)]
            if ours:
                table.add_row(step, *milliseconds(ours), *milliseconds(bare), ratio(ours, bare))
            if step == PLAIN_PAUSE:
                table.add_row(WRITE, "", "", *milliseconds(sides["bare"][WRITE]), "")
        console.print(table)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, (share,) in cpu.items())
    console.print(f"CPU of an idle sandbox, of one core: {shares}")
    console.print(machine())


def plot(results: dict[str, dict[str, Samples]], path: Path) -> None:
    """Pause and resume against what a sandbox holds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    sizes = [int(mb) + 120 for mb in results]
    for panel, lines in zip(panels, ((PAUSE, PLAIN_PAUSE, WRITE), (RESUME, PLAIN_RESUME)), strict=True):
        for step in lines:
            side = "bare" if step == WRITE else "engine"
            panel.plot(sizes, [statistics.median(each[side][step]) for each in results.values()], "o-", label=step)
        bare = [statistics.median(each["bare"][lines[0]]) for each in results.values()]
        panel.plot(
            sizes, bare, "o--", color="grey", label=f"bare runsc {'checkpoint' if PAUSE in lines else 'restore'}"
        )
        panel.set_xlabel("MB in the sandbox")
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds, p50")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw pause and resume against memory here")
    arguments = parser.parse_args()
    console = Console(file=sys.stdout)
    results, cpu = asyncio.run(measure(arguments.rounds, console))
    show(results, cpu, console)
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps({**results, "idle CPU": cpu}, indent=1))


if __name__ == "__main__":
    main()
