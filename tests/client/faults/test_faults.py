from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import sandbox_tools.client.client
import sandbox_tools.client.sandbox
from sandbox_tools.client import Client
from tests.client.faults.proxy import Proxy
from tests.client.faults.schedule import Schedule
from tests.client.faults.workload import ALLOWANCE, LONG, LOOK, REQUEST, Workload
from tests.conftest import own_state
from tests.machine import PATIENCE, EngineProcess

KEY = "e2b_0123456789abcdef"


class TcpEngine(EngineProcess):
    """An engine on a TCP port, which demands a key."""

    def __init__(self, state: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        super().__init__(state, options=("--host", "127.0.0.1", "--port", str(self.port), "--api-key", KEY))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"X-API-KEY": KEY}, timeout=PATIENCE, trust_env=False)


@pytest.fixture
def engine(templates: Path) -> Iterator[TcpEngine]:
    with own_state() as state:
        engine = TcpEngine(state).start()
        yield engine
        engine.clear()
        engine.stop()
        assert [] == engine.containers()


@pytest.fixture(autouse=True)
def _short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes at most takes seconds here: a request that is never answered is to end in this test."""
    monkeypatch.setattr(sandbox_tools.client.client, "LONG_REQUEST", LONG)
    monkeypatch.setattr(sandbox_tools.client.sandbox, "LOOK_TIMEOUT", LOOK)


async def survive(engine: TcpEngine, *, seed: int, operations: int, tasks: int) -> tuple[Workload, Schedule]:
    """Random operations through a bad network; fails where anything was wrong or is left over."""
    own_tasks, descriptors = asyncio.all_tasks(), os.listdir("/proc/self/fd")
    schedule = Schedule(seed)
    async with Proxy("127.0.0.1", engine.port, schedule) as proxy:
        client = Client(provider="local", api_url=proxy.url, api_key=KEY, request_timeout=REQUEST)
        async with Client(provider="local", api_url=engine.url, api_key=KEY) as clean:
            workload = Workload(client, clean, proxy, seed=seed, secrets={KEY})
            async with client:
                await workload.run(operations, tasks=tasks)

        async with asyncio.timeout(ALLOWANCE):
            await proxy.deserted()
        left = asyncio.all_tasks() - own_tasks - proxy.tasks
        assert not left
        assert [] == proxy.failures

    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    wrong = "\n".join(workload.wrong[:20])
    assert not wrong, f"seed {seed}, {len(workload.wrong)} wrong:\n{wrong}"
    return workload, schedule


async def test_through_a_bad_network_nothing_is_done_twice_lost_or_left_over(engine: TcpEngine) -> None:
    workload, schedule = await survive(engine, seed=4, operations=100, tasks=5)

    assert len(schedule.drawn) > 30
    assert {verb for verb, _ in workload.outcomes} >= {"create", "run_code", "pause", "connect", "kill", "list"}


@pytest.mark.soak
async def test_five_thousand_operations_through_a_bad_network(
    engine: TcpEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("FAULTS_SEED", "4"))
    workload, schedule = await survive(engine, seed=seed, operations=5000, tasks=8)

    with capsys.disabled():
        print(f"\n{workload.table()}\n\n{schedule.table()}")
