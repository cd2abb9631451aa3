"""What many sessions in one process take: memory, tasks, and the time of a turn and of a decision.

The service answers at once and in this process, so that all that is measured is ours. `python -m benchmarks.sessions`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from sandbox_tools import AdaptivePause, PauseAfter, Sessions
from sandbox_tools.client.dialects import LOCAL
from sandbox_tools.models import SandboxInfo
from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.pause import Idle, Period
from sandbox_tools.policy.tally import Tally
from sandbox_tools.session.bindings import MemoryBindings


class Box:
    """A sandbox that does nothing."""

    def __init__(self, sandbox_id: str) -> None:
        self.id = sandbox_id
        self.commands = self
        self.started: set[int] = set()

    async def plant(self, *, memory: bool) -> None:
        return None


class Service:
    """A provider that answers at once; shaped like `Client`."""

    dialect = replace(LOCAL, can_freeze=False)

    def __init__(self) -> None:
        self.made = 0
        self.paused: list[float] = []

    async def create(self, template: str | None, **more: Any) -> Box:
        self.made += 1
        return Box(f"box{self.made}")

    async def connect(self, sandbox_id: str, *, timeout: int) -> Box:
        return Box(sandbox_id)

    async def pause(self, sandbox_id: str, *, memory: bool) -> bool:
        self.paused.append(time.time())
        return True

    async def set_timeout(self, sandbox_id: str, timeout: int) -> None: ...

    async def info(self, sandbox_id: str) -> SandboxInfo:
        now = datetime.now(UTC)
        size: dict[str, Any] = {"cpu_count": 2, "memory_mb": 512}
        return SandboxInfo(sandbox_id=sandbox_id, template_id="t", state="running", started_at=now, end_at=now, **size)

    async def list(self, **more: Any) -> Any:
        for info in ():
            yield info


def percentile(samples: list[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def decisions(rounds: int) -> list[float]:
    """Seconds of one decision each, with statistics to decide on."""
    policy, terms = AdaptivePause(), Terms.of(vcpu=2, gib=0.5)
    pool = sum((policy.learn(Period(gap=7.0 * n, threshold=30.0), terms) for n in range(100)), Tally())
    taken = []
    for n in range(rounds):
        started = time.perf_counter()
        policy.plan(Idle(owner="ann", began=float(n), terms=terms), pool, pool)
        taken.append(time.perf_counter() - started)
    return taken


async def many(count: int) -> dict[str, float]:
    """That many conversations, each with a turn, and then idle and awake."""
    service, bindings = Service(), MemoryBindings()
    tracemalloc.start()
    async with Sessions(service, bindings=bindings, policy=PauseAfter(3600)) as sessions:  # type: ignore[arg-type]

        async def turn(number: int) -> float:
            session = sessions.session(f"t{number}", owner=f"o{number % 100}")
            started = time.perf_counter()
            async with session.turn(), session.lease():
                pass
            return time.perf_counter() - started

        await turn(0)
        before, _ = tracemalloc.get_traced_memory()
        taken = [await turn(number) for number in range(1, count)]
        after, _ = tracemalloc.get_traced_memory()
        tasks = len(asyncio.all_tasks())
        awake = len(sessions.transitions.awake)
    return {
        "bytes a session": (after - before) / (count - 1),
        "tasks": tasks,
        "awake": awake,
        "paused at the end": len(service.paused),
        "turn p50 ms": 1e3 * statistics.median(taken),
        "turn p99 ms": 1e3 * percentile(taken, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    decided = decisions(arguments.sessions)
    figures = asyncio.run(many(arguments.sessions))
    figures |= {f"decide p{share} us": 1e6 * percentile(decided, share / 100) for share in (50, 99)}
    print(f"{arguments.sessions} sessions in one process, on {machine()}")
    for name, figure in figures.items():
        print(f"{name:>20}  {figure:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
