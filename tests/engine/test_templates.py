"""The warmed template: made once, and nothing of a crash in the middle of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from sandbox_tools.engine.templates import prepare
from tests.conftest import own_state
from tests.machine import PATIENCE, EngineProcess


def warming(templates: Path) -> list[int]:
    """Host processes of containers that are being warmed."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = process.read_text(errors="replace").split("\0")
        except OSError:
            continue
        if "boot" in argv and any(word.startswith(f"--root={templates}/warm-") for word in argv):
            found.append(int(process.parent.name))
    return found


async def test_a_template_is_made_again_after_a_crash_and_the_crashed_one_is_ended(templates: Path) -> None:
    """Another size of memory is another template, on the root file system that is there."""
    with own_state() as state:
        engine = EngineProcess(state, options=("--memory-mb", "1536"))
        engine.spawn()
        deadline = time.monotonic() + PATIENCE
        while not warming(templates) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.process is not None
        os.kill(engine.process.pid, signal.SIGKILL)
        engine.process.wait()
        [left] = warming(templates)

        made = await prepare(state, templates, memory_mb=1536)
        shutil.rmtree(made.image.parent)  # the next run of this test has to make it anew

        assert left not in warming(templates)
        assert list(templates.glob("warm-*")) == []
        assert list((templates / "images").glob(".partial-*")) == []
