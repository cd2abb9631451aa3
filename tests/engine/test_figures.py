"""What Prometheus scrapes: how many sandboxes do what, and how long the control plane took."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sandbox_tools import Client
from sandbox_tools.engine.runsc import Runsc
from tests.engine.inside import engine_inside
from tests.machine import PATIENCE, EngineProcess


def scraped(engine: EngineProcess) -> dict[tuple[str, ...], float]:
    """Each sample by its name and the values of its labels."""
    with engine.http() as http:
        page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(page.text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


async def test_sandboxes_are_counted_by_what_they_do_and_operations_by_what_came_of_them(
    own_engine: EngineProcess,
) -> None:
    def counted() -> list[float]:
        seen = scraped(own_engine)
        return [seen["sandbox_tools_sandboxes", state] for state in ("running", "frozen", "paused", "changing")]

    async with Client(provider="local", state_dir=own_engine.state) as client:
        assert counted() == [0, 0, 0, 0]
        first, second = await client.create(), await client.create()
        assert counted() == [2, 0, 0, 0]
        await client.freeze(first.id)
        await client.pause(second.id)
        assert counted() == [0, 1, 1, 0]
        assert not await client.kill("nobody")
        seen = scraped(own_engine)

    assert seen["sandbox_tools_operation_seconds_count", "create", "ok"] == 2
    assert seen["sandbox_tools_operation_seconds_count", "pause", "ok"] == 1
    assert seen["sandbox_tools_operation_seconds_count", "kill", "NotFoundError"] == 1
    assert seen["sandbox_tools_operation_seconds_sum", "create", "ok"] > 0.01
    assert seen["sandbox_tools_sandboxes_resident_bytes",] > 10 << 20
    assert seen["sandbox_tools_disk_free_bytes",] > 0
    assert seen["process_resident_memory_bytes",] > 10 << 20
    assert not any(sandbox.id in str(seen) for sandbox in (first, second))


def test_nobody_waits_while_the_memory_of_a_sandbox_is_read(templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, answered = threading.Event(), threading.Event()

    def resident_bytes(_runsc: Runsc, _container: object) -> int:
        reading.set()
        assert answered.wait(PATIENCE)
        return 42

    monkeypatch.setattr(Runsc, "resident_bytes", resident_bytes)
    with engine_inside(templates) as engine, engine.http() as http, engine.http() as other:
        box = engine.create()
        for path in (f"/sandboxes/{box.id}", "/metrics"):
            with ThreadPoolExecutor(1) as thread:
                looked = thread.submit(http.get, path)
                assert reading.wait(PATIENCE)

                assert other.get("/v2/sandboxes").status_code == 200

                answered.set()
                assert "42" in looked.result(PATIENCE).text
            reading.clear()
            answered.clear()
