"""What many paused sandboxes cost the engine that keeps them: nothing runs, and it must start, list and stay small.

The sandboxes are one that was really paused, and copies of its record under other names, whose snapshots are links to
its files: to the engine each is a sandbox of its own. The limit beside it is the same engine with that one alone.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.figures import Samples, machine, milliseconds, options, ratio
from sandbox_tools.engine.records import Record, new_id
from sandbox_tools.paths import socket_path, state_directory, templates_directory

START, PAGE, LAST_PAGE, MEMORY = "start", "page of 100", "last page of 100", "RSS, MB"
PAGES = 30


class Engine:
    """An engine on a state directory, from its start to its end."""

    def __init__(self, state: Path, *options: str) -> None:
        self.state = state
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path(state))), base_url="http://engine", timeout=120
        )
        started = time.perf_counter()
        argv = [sys.executable, "-m", "sandbox_tools", "serve", "--state-dir", str(state), *options]
        with (state / "engine.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        while not self._ready():
            time.sleep(0.005)
        self.started = time.perf_counter() - started

    def _ready(self) -> bool:
        assert self.process.poll() is None, (self.state / "engine.log").read_text()
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def page(self, token: str | None = None) -> tuple[float, str | None]:
        """Seconds that a page took, and the next one's token."""
        parameters = {"state": "paused", "limit": "100", **({"nextToken": token} if token else {})}
        began = time.perf_counter()
        answer = self.http.get("/v2/sandboxes", params=parameters)
        took = time.perf_counter() - began
        assert answer.status_code == 200, answer.text
        assert answer.json()
        return took, answer.headers.get("x-next-token")

    def measure(self, into: Samples) -> None:
        into.setdefault(START, []).append(self.started)
        for _ in range(PAGES):
            into.setdefault(PAGE, []).append(self.page()[0])
        token = None
        while True:
            took, token = self.page(token)
            if token is None:
                break
        into.setdefault(LAST_PAGE, []).append(took)
        into.setdefault(MEMORY, []).append(psutil.Process(self.process.pid).memory_info().rss / (1 << 20) / 1000)

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait()


def multiply(state: Path, count: int, console: Console) -> None:
    """Copies of the only sandbox of a state directory, until there are so many."""
    (directory,) = (state / "sandboxes").iterdir()
    record = Record.load(directory)
    assert record is not None
    snapshot = state / "snapshots" / record.id / str(record.snapshot)
    for number in track(range(1, count), "copying", console=console, transient=True):
        started = record.started_at - timedelta(seconds=number)
        copy = record.model_copy(update={"id": new_id(), "token": secrets.token_hex(24), "started_at": started})
        place = state / "sandboxes" / copy.id
        place.mkdir()
        (place / "record.json").write_text(copy.model_dump_json())
        image = state / "snapshots" / copy.id / snapshot.name
        image.mkdir(parents=True)
        for file in snapshot.iterdir():
            os.link(file, image / file.name)


def show(results: dict[str, Samples], console: Console) -> None:
    table = Table(title="an engine with paused sandboxes, ms unless said otherwise", title_justify="left")
    (many, ours), (one, theirs) = results.items()
    for column in ("", f"{many} paused, p50", "p95", f"{one} paused, p50", "p95", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for step, samples in ours.items():
        table.add_row(step, *milliseconds(samples), *milliseconds(theirs[step]), ratio(samples, theirs[step]))
    console.print(table)
    console.print(machine())


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--count", type=int, default=10_000, help="paused sandboxes (default: 10000)")
    arguments = parser.parse_args()
    console = Console(file=sys.stdout)
    os.environ.setdefault("SANDBOX_TOOLS_TEMPLATES_DIR", str(templates_directory(state_directory())))
    state = Path(tempfile.mkdtemp(prefix="crowd-", dir=state_directory()))
    results: dict[str, Samples] = {str(arguments.count): {}, "1": {}}
    try:
        engine = Engine(state, "--pool", "0")
        sandbox = engine.http.post("/sandboxes", json={"templateID": "base"}).json()["sandboxID"]
        assert engine.http.post(f"/sandboxes/{sandbox}/pause").status_code == 204
        engine.stop()
        for kind in ("1", str(arguments.count)):
            if kind != "1":
                multiply(state, arguments.count, console)
            for _ in range(arguments.rounds):
                engine = Engine(state, "--pool", "0")
                engine.measure(results[kind])
                engine.stop()
    finally:
        shutil.rmtree(state, ignore_errors=True)
    show(results, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
