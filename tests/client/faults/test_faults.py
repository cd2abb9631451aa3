from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import sandbox_tools.client.client
import sandbox_tools.client.control
import sandbox_tools.client.exchange
from sandbox_tools.client import Client, transport
from tests.client.faults.deadlines import ALLOWANCE, LONG, LOOK, PAUSE, REQUEST
from tests.client.faults.proxy import Proxy
from tests.client.faults.schedule import Schedule
from tests.client.faults.workload import Workload
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
        engine = TcpEngine(state)
        engine.start()
        yield engine
        engine.clear()
        engine.stop()
        assert [] == engine.containers()


@pytest.fixture(autouse=True)
def _short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes at most takes seconds here: a request that is never answered is to end in this test."""
    monkeypatch.setattr(sandbox_tools.client.client, "LONG_REQUEST", LONG)
    monkeypatch.setattr(sandbox_tools.client.control, "LONG_REQUEST", PAUSE)
    monkeypatch.setattr(sandbox_tools.client.exchange, "LOOK_TIMEOUT", LOOK)


async def survive(engine: TcpEngine, schedule: Schedule, *, operations: int, tasks: int) -> Workload:
    """Random operations through a bad network; fails where the client leaves anything behind."""
    own_tasks, own_descriptors = asyncio.all_tasks(), descriptors()
    async with Proxy("127.0.0.1", engine.port, schedule) as proxy:
        client = Client(provider="local", api_url=proxy.url, api_key=KEY, request_timeout=REQUEST)
        async with Client(provider="local", api_url=engine.url, api_key=KEY) as clean:
            workload = Workload(client, clean, proxy, seed=schedule.seed, secrets={KEY})
            async with client:
                await workload.run(operations, tasks=tasks)

        async with asyncio.timeout(ALLOWANCE):
            await proxy.deserted()
        left = asyncio.all_tasks() - own_tasks - proxy.tasks
        assert not left
        assert [] == proxy.failures

    left_open = descriptors() - own_descriptors
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ALLOWANCE):
            while left_open := descriptors() - own_descriptors:
                await asyncio.sleep(0.05)
    workload.wrong += [f"Left open: {what}" for what in left_open]
    return workload


def descriptors() -> set[str]:
    """What this process has open, sockets with their addresses."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            what = os.readlink(f"/proc/self/fd/{number}")
            if what.startswith("socket:"):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as copy:
                    what += f" {copy!r}"
                what = re.sub(r"fd=\d+", "", what)
            found.add(f"{number} {what}")
    return {what for what in found if "/fd" not in what}


def assert_all_right(workload: Workload) -> None:
    wrong = "\n".join(workload.wrong[:20])
    assert not wrong, f"{len(workload.wrong)} wrong:\n{wrong}"


async def test_through_a_bad_network_nothing_is_done_twice_lost_or_left_over(engine: TcpEngine) -> None:
    schedule = Schedule(4)
    workload = await survive(engine, schedule, operations=200, tasks=5)

    assert_all_right(workload)
    assert len(schedule.drawn) > 30
    assert {verb for verb, _ in workload.outcomes} >= {
        "create",
        "run_code",
        "pause",
        "connect",
        "kill",
        "list",
        "files.write",
    }


@pytest.mark.soak
async def test_a_client_that_repeats_whatever_failed_is_found_out(
    engine: TcpEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other tests here look for can be seen by them."""
    repeat = transport.repeat
    monkeypatch.setattr(transport, "repeat", lambda once, again: repeat(once, lambda error: True))
    workload = await survive(engine, Schedule(4, quiet=40), operations=80, tasks=4)

    assert [wrong for wrong in workload.wrong if wrong.startswith("Sent ")], workload.table()


@pytest.mark.soak
async def test_five_thousand_operations_through_a_bad_network(
    engine: TcpEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """`FAULTS_SEED` and `FAULTS_OPERATIONS` in the environment ask for others."""
    schedule = Schedule(int(os.environ.get("FAULTS_SEED", "4")), patient=True)
    workload = await survive(engine, schedule, operations=int(os.environ.get("FAULTS_OPERATIONS", "5000")), tasks=8)

    with capsys.disabled():
        sys.stdout.write(f"\nseed {schedule.seed}\n{workload.table()}\n{schedule.table()}\n")
    assert_all_right(workload)
    rare = {"create_context", "code in a context", "snapshot", "delete_snapshot", "fork", "files.write", "files.read"}
    assert rare <= {verb for verb, outcome in workload.outcomes if outcome == "ok"}
