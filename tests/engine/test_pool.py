"""What is kept ready is nobody's until it is asked for, is then like any other, and is never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import own_state
from tests.machine import PATIENCE, EngineProcess


def filled(engine: EngineProcess, count: int) -> list[str]:
    """The containers, once there are so many, all of which stand still that nobody has asked for."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        containers = engine.containers()
        if len(containers) == count and all(_stands_still(engine, name) for name in spares(engine)):
            return containers
        time.sleep(0.05)
    raise AssertionError((engine.containers(), engine.log()))


def spares(engine: EngineProcess) -> list[str]:
    """The ids of those that nobody has asked for."""
    rows = {row["sandboxID"] for row in engine.rows()}
    return [name.rpartition("-")[0] for name in engine.containers() if name.rpartition("-")[0] not in rows]


def _pid(engine: EngineProcess, sandbox_id: str) -> int:
    return int(next((engine.state / "sandboxes" / sandbox_id).glob("run-*/pid")).read_text())


def _stands_still(engine: EngineProcess, sandbox_id: str) -> bool:
    # It may be on its way up still.
    with contextlib.suppress(StopIteration, OSError, ValueError):
        return "\nState:\tT" in Path(f"/proc/{_pid(engine, sandbox_id)}/status").read_text()
    return False


@pytest.fixture
def pooled(templates: Path) -> Iterator[EngineProcess]:
    with own_state() as state:
        engine = EngineProcess(state, pool=2).start()
        try:
            yield engine
        finally:
            if engine.process is not None and engine.process.poll() is None:
                engine.clear()
                engine.stop()
        assert engine.containers() == []
        assert list(state.glob("runsc/*.state")) == []
        assert list(state.glob("sandboxes/*")) == []


def test_a_create_takes_what_is_ready_and_it_is_made_up_for(pooled: EngineProcess) -> None:
    ready = [name.rpartition("-")[0] for name in filled(pooled, 2)]
    assert pooled.rows() == []

    boxes = [pooled.create(envVars={"WHO": who}, metadata={"who": who}) for who in ("first", "second", "third")]

    assert {box.id for box in boxes[:2]} == set(ready)
    for box, who in zip(boxes, ("first", "second", "third"), strict=True):
        assert box.value("import os; os.environ['WHO']") == who
        assert box.info()["metadata"] == {"who": who}
        box.run(f"kept = {who!r}")
        assert box.post("pause").status_code == 204
        assert box.post("connect", timeout=600).status_code == 201
        assert box.value("kept") == who
    filled(pooled, 5)


def test_what_was_made_ready_has_no_trace_of_it(pooled: EngineProcess) -> None:
    filled(pooled, 2)
    box = pooled.create()
    first = box.run("In, Out, [name for name in dir() if not name.startswith('__')]")

    pooled.stop()
    pooled.options = (*pooled.options, "--pool", "0")
    pooled.start()
    plain = pooled.create().run("In, Out, [name for name in dir() if not name.startswith('__')]")

    def told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in event.items() if name != "timestamp"} for event in events]

    assert told(first) == told(plain)


def test_what_is_ready_shares_no_random_numbers_and_does_not_count(templates: Path) -> None:
    with own_state() as state:
        engine = EngineProcess(state, pool=2, options=("--max-sandboxes", "2")).start()
        try:
            filled(engine, 2)
            with ThreadPoolExecutor() as threads:
                boxes = list(threads.map(lambda _: engine.create(), range(2)))
            drawn = {box.value("import random, os; random.random(), os.urandom(4)") for box in boxes}
            assert len(drawn) == 2
            with engine.http() as http:
                assert http.post("/sandboxes", json={"templateID": "base"}).status_code == 429
        finally:
            engine.clear()
            engine.stop()
        assert engine.containers() == []


def test_one_that_died_while_it_was_ready_is_replaced_and_nobody_notices(pooled: EngineProcess) -> None:
    filled(pooled, 2)
    dead = spares(pooled)
    for sandbox_id in dead:
        os.kill(_pid(pooled, sandbox_id), signal.SIGKILL)

    box = pooled.create()

    assert box.id not in dead
    assert box.value("1 + 1") == "2"
    filled(pooled, 3)


def test_a_killed_engine_leaves_nothing_that_its_successor_does_not_end(pooled: EngineProcess) -> None:
    before = filled(pooled, 2)
    pooled.kill()
    pooled.start()

    after = filled(pooled, 2)

    assert not set(before) & set(after)


def test_an_engine_that_is_told_to_stop_while_it_makes_one_ready_leaves_nothing(pooled: EngineProcess) -> None:
    deadline = time.monotonic() + PATIENCE
    while not list(pooled.state.glob("sandboxes/*/run-*")) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert pooled.stop() == 0
    assert pooled.containers() == []
