"""Many sandboxes at once, each made, used, paused, resumed, used, killed, again and again: no error, nothing left."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import own_state
from tests.machine import Box, EngineProcess

AT_ONCE = 50
ROUNDS = int(os.environ.get("SANDBOX_TOOLS_LOAD_ROUNDS", "1000"))


def life(engine: EngineProcess, number: int) -> None:
    box: Box = engine.create(timeout=3600)
    box.run(f"kept = {number}")
    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=3600).status_code == 201
    assert box.value("kept") == str(number)
    assert box.kill() == 204


def left(engine: EngineProcess) -> Counter[str]:
    """All that a leak would show in."""
    assert engine.process is not None
    process = psutil.Process(engine.process.pid)
    counted = Counter(
        {
            "descriptors": process.num_fds(),
            "children": len(process.children(recursive=True)),
            "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
            "control groups": len(list(Path("/sys/fs/cgroup").glob("**/sandbox-tools/*/"))),
        }
    )
    for where in ("sandboxes", "snapshots", "saved", "runsc"):
        counted[where] = len(list((engine.state / where).glob("*")))
    counted["plain images"] = len(engine.plain_images())
    counted["containers"] = len(engine.containers())
    return counted


@pytest.mark.soak
def test_fifty_sandboxes_at_once_again_and_again_leave_nothing_behind(templates: Path) -> None:
    with own_state() as state:
        engine = EngineProcess(state, pool=1).start()
        try:
            for number in range(3):
                life(engine, number)
            engine.wait_quiet()
            before = left(engine)
            with ThreadPoolExecutor(AT_ONCE) as threads:
                failures: Counter[str] = Counter()
                for work in [threads.submit(life, engine, number) for number in range(ROUNDS)]:
                    try:
                        work.result()
                    except (AssertionError, httpx.HTTPError) as error:
                        failures[repr(error)[:300]] += 1
            assert failures == Counter()
            engine.wait_quiet()
            after = left(engine)
            # A connection that is kept may be one more or less.
            assert abs(after.pop("descriptors") - before.pop("descriptors")) <= 5
            assert after == before
        finally:
            engine.clear()
            engine.stop()
        assert engine.containers() == []
