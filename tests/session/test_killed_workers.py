"""Worker processes share bindings and an engine, and are killed at random: no state is lost, nothing stays awake."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox_tools.client import Client
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.stamps import HANDLE, THREAD
from tests.machine import EngineProcess

from .stores import bindings_at, place_of
from .worker import EXPIRY, THRESHOLD

LATE = 10.0
"""Seconds past its time that a sandbox may be awake."""


@dataclass(frozen=True)
class Size:
    threads: int
    workers: int
    at_once: int
    seconds: float
    every: float


class App:
    """The workers, and one that watches from outside."""

    def __init__(self, place: str, engine: EngineProcess, log: Path, size: Size) -> None:
        self.place = place
        self.engine = engine
        self.log = log
        self.size = size
        self.workers: list[subprocess.Popen[bytes]] = []
        self.errors = log.with_suffix(".errors")
        self.killed = 0
        self.free: dict[str, float] = {}
        """Since when nothing is known to keep a sandbox awake that is so."""
        self.latest = 0.0
        self.most = 0

    def spawn(self) -> None:
        command = [sys.executable, "-m", "tests.session.worker", self.place, str(self.engine.state)]
        command += [str(self.size.threads), str(self.size.at_once), str(self.log)]
        with self.errors.open("ab") as errors:
            self.workers.append(subprocess.Popen(command, stderr=errors))

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        self.workers.remove(worker)
        worker.kill()
        worker.wait()
        self.killed += 1

    async def run(self) -> None:
        client = Client(provider="local", state_dir=self.engine.state)
        bindings = bindings_at(self.place)
        await bindings.find("default", "t0")  # the tables are there before many look for them
        for _ in range(self.size.workers):
            self.spawn()
        try:
            end, next_kill = time.time() + self.size.seconds, time.time() + self.size.every
            while time.time() < end:
                await asyncio.sleep(0.5)
                assert all(worker.poll() is None for worker in self.workers), self.errors.read_text()
                await self.watch(client, bindings)
                if time.time() > next_kill:
                    self.kill(random.choice(self.workers))
                    self.spawn()
                    next_kill = time.time() + random.uniform(0.5, 1.5) * self.size.every
            # All but one are killed at once: it puts to sleep what they leave, and goes on with its own.
            while len(self.workers) > 1:
                self.kill(self.workers[0])
            end = time.time() + EXPIRY + LATE
            while time.time() < end:
                await asyncio.sleep(0.5)
                await self.watch(client, bindings)
            # Nobody is left: what was in use is left to the server's timer of five minutes, and nothing else.
            self.kill(self.workers[0])
            await self.few_run(client, THRESHOLD + LATE)
        finally:
            for worker in self.workers:
                worker.kill()
                worker.wait()
            await bindings.aclose()
            await client.aclose()

    async def few_run(self, client: Client, seconds: float) -> None:
        """Within that time no more run than one worker uses at once."""
        end = time.time() + seconds
        while True:
            running = [info async for info in client.list(state="running")]
            if len(running) <= self.size.at_once:
                return
            assert time.time() < end, running
            await asyncio.sleep(0.5)

    async def watch(self, client: Client, bindings: Bindings) -> None:
        """No thread has two sandboxes, and none is awake long after nothing keeps it so."""
        now = time.time()
        free = set(await bindings.list_idle(now, now))
        infos = [info async for info in client.list()]
        threads = collections.Counter(info.metadata[THREAD] for info in infos)
        assert max(threads.values(), default=0) <= 1, threads
        awake = {info.metadata[HANDLE] for info in infos if info.state == "running"}
        self.most = max(self.most, len(awake))
        self.free = {handle: self.free.get(handle, now) for handle in free & awake}
        self.latest = max([self.latest, *(now - since for since in self.free.values())])
        assert self.latest <= LATE, {handle: await bindings.get(handle) for handle in self.free}


def judge(log: Path) -> dict[str, int]:
    """Every sandbox's counter has only grown, in its memory and in its file; figures."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    errors = [entry for entry in entries if "error" in entry]
    assert errors == []
    counts: dict[str, list[tuple[float, float, int, int]]] = collections.defaultdict(list)
    for entry in entries:
        in_file, n = map(int, entry["said"].split())
        assert in_file < n, entry
        assert entry["lost"] == [], entry
        counts[entry["thread"]].append((entry["began"], entry["at"], in_file, n))
    for thread, seen in counts.items():
        assert len({n for *_, n in seen}) == len(seen), (thread, sorted(seen))
        for began, _, in_file, n in seen:
            # Code whose worker is killed is interrupted, perhaps between memory and file: these are lines of no entry.
            before = max((n for _, ended, _, n in seen if ended < began), default=0)
            assert before <= in_file < n, (thread, sorted(seen))
    return {"calls": len(entries), "threads": len(counts), "longest": max(len(seen) for seen in counts.values())}


def go(store: str, request: pytest.FixtureRequest, tmp_path: Path, size: Size) -> None:
    engine = request.getfixturevalue("own_engine")
    app = App(place_of(store, request, tmp_path), engine, tmp_path / "log", size)
    app.log.touch()
    asyncio.run(app.run())
    figures = judge(app.log)
    seen = f"{app.killed} workers killed, at most {app.most} awake, the latest {app.latest:.1f} s past its time"
    print(f"{store}: {figures}, {seen}")  # noqa: T201
    assert figures["longest"] > 2


@pytest.mark.parametrize("store", ["file", "postgres"])
def test_workers_killed_at_random_lose_nothing(store, request, tmp_path):
    go(store, request, tmp_path, Size(threads=6, workers=3, at_once=2, seconds=8, every=2.5))


@pytest.mark.soak
@pytest.mark.parametrize("store", ["file", "postgres"])
def test_workers_killed_at_random_for_five_minutes_lose_nothing(store, request, tmp_path):
    go(store, request, tmp_path, Size(threads=200, workers=4, at_once=2, seconds=300, every=5))
