"""Small commands start without what only sandboxes need, end in time, and are not left behind."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys

import pytest

from sandbox_tools.engine import brisk
from sandbox_tools.engine.brisk import _MEMBARRIER, Brisk
from tests.conftest import as_root

ASKS_FOR_MEMBARRIER = """
import ctypes, sys
kernel = ctypes.CDLL(None, use_errno=True)
if kernel.syscall(int(sys.argv[1]), 0, 0, 0) < 0:
    sys.exit(ctypes.get_errno())
"""


async def ran(*argv: str, seconds: float = 20) -> tuple[int, bytes, bytes]:
    commands = Brisk()
    return await commands.end(await commands.start(list(argv)), seconds)


async def test_what_a_command_wrote_and_how_it_ended_is_told() -> None:
    code, out, err = await ran("sh", "-c", "echo out; echo err >&2; exit 3")

    assert (code, out, err) == (3, b"out\n", b"err\n")


@as_root
@pytest.mark.skipif(platform.machine() not in _MEMBARRIER, reason="its number of membarrier(2) is not known here")
async def test_only_these_commands_are_told_that_the_kernel_has_no_membarrier() -> None:
    argv = [sys.executable, "-c", ASKS_FOR_MEMBARRIER, str(_MEMBARRIER[platform.machine()][1])]

    code, _, _ = await ran(*argv)

    assert os.strerror(code) == "Function not implemented"
    assert subprocess.run(argv, check=False).returncode == 0


async def test_a_command_that_does_not_end_in_time_is_killed() -> None:
    commands = Brisk()
    process = await commands.start(["sleep", "600"])

    with pytest.raises(TimeoutError):
        await commands.end(process, 0.1)

    assert process.returncode == -9


async def test_a_command_whose_caller_leaves_as_it_starts_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = brisk._start, []

    def recorded(argv: list[str]) -> subprocess.Popen[bytes]:
        started.append(start(argv))
        return started[-1]

    monkeypatch.setattr(brisk, "_start", recorded)
    starting = asyncio.create_task(Brisk().start(["sleep", "600"]))
    await asyncio.sleep(0)
    starting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await starting

    assert [process.returncode for process in started] == [-9]
