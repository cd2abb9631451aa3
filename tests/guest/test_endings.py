"""Code that is left, that never ends, or that takes its kernel with it: nothing is lost without a word."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sandbox_tools.guest import contexts
from sandbox_tools.guest.contexts import Outlet
from sandbox_tools.guest.events import ENDED

from .conftest import Guest, of_type, text

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def leave(guest: Guest, code: str) -> None:
    """Runs code until its first output, then closes the connection."""
    async with guest.stream(code) as events:
        async for event in events:
            if event["type"] == "stdout":
                return


async def gone(pid: int) -> None:
    """Waits until a process has ended."""
    async with asyncio.timeout(20):
        # A process whose first thread has ended looks like a zombie while others are still ending.
        while (status := _status(pid)) and not ("State:\tZ" in status and "Threads:\t1" in status):
            await asyncio.sleep(0.01)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def test_leaving_an_execution_interrupts_it_and_keeps_variables_and_background_processes(guest: Guest) -> None:
    """The interrupt spares what earlier code left in the background, though it is of the kernel's process group."""
    await guest.run("import subprocess\nchild = subprocess.Popen(['sleep', '600'])")
    await leave(guest, "kept = 5\nprint('running', flush=True)\nwhile True: pass")

    assert await guest.value("kept, child.poll()") == "(5, None)"
    await guest.run("child.kill(); child.wait()")


async def test_code_that_waits_for_a_child_deaf_to_signals_is_interrupted_too(guest: Guest) -> None:
    """`os.system` ignores SIGINT while its child lives, so the child must get it."""
    await leave(guest, "import os\nprint('running', flush=True)\nos.system('sleep 600')")

    assert await guest.value("'free'") == "free"


async def test_code_that_awaits_is_interrupted_too(guest: Guest) -> None:
    """The kernel's loop sleeps then, and must be woken to hear of it."""
    await leave(guest, "import asyncio\nkept = 6\nprint('running', flush=True)\nawait asyncio.sleep(600)")

    assert await guest.value("kept") == "6"


INTERRUPTED_BEFORE_ITS_REPLY = """
kept = 7
session = get_ipython().kernel.session
send = session.send

def interrupted(stream, kind, *arguments, **more):
    if kind != "execute_reply":
        return send(stream, kind, *arguments, **more)
    session.send = send
    raise KeyboardInterrupt

session.send = interrupted
"""


async def test_an_interrupt_that_costs_a_kernel_its_reply_costs_nobody_the_variables(guest: Guest) -> None:
    """SIGINT may come when the code is over already, while the kernel has its answer in hand."""
    events = await guest.run(INTERRUPTED_BEFORE_ITS_REPLY)

    assert [event["name"] for event in of_type(events, "error")] == ["KeyboardInterrupt"]
    assert await guest.value("kept") == "7"


async def test_leaving_before_the_turn_comes_means_that_the_code_never_runs(guest: Guest) -> None:
    gate = "import pathlib, time\nprint('in', flush=True)\nwhile not pathlib.Path('turn').exists(): time.sleep(0.01)"
    async with guest.stream(gate) as first:
        while (await anext(first))["type"] != "stdout":
            pass
        async with guest.stream("print('never'); ran = True"):
            pass
        (guest.cwd / "turn").touch()
        assert [event async for event in first][-1]["type"] == "end_of_execution"

    assert await guest.value("'ran' in globals()") == "False"


async def test_code_that_ignores_its_interrupt_is_named_to_the_next_caller_and_killed_for_the_one_after(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "PATIENCE", 2)
    await leave(
        guest,
        """
import time
while True:
    try:
        print('running', flush=True)
        while True: time.sleep(1)
    except KeyboardInterrupt: pass
""",
    )

    (warned,) = of_type(await guest.run("1"), "error")
    assert warned["name"] == "ExecutionAborted"
    assert "not run" in warned["value"]

    (killed,) = of_type(await guest.run("1"), "error")
    assert killed["name"] == "ContextRestarting"
    assert "ignored" in killed["value"]
    assert await guest.value("'running again'") == "running again"


async def test_a_kernel_that_dies_under_its_code_is_said_in_words_and_comes_back(guest: Guest) -> None:
    """Its last output still arrives, and other processes live on."""
    pid = int(await guest.value("import os, subprocess\nsubprocess.Popen(['sleep', '600']).pid"))
    code = """
import pathlib, time
print('last words', flush=True)
while not pathlib.Path('heard').exists(): time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    events = []
    async with guest.stream(code) as stream:
        async for event in stream:
            events.append(event)
            if event["type"] == "stdout":
                (guest.cwd / "heard").touch()

    assert text(events) == "last words\n"
    (error,) = of_type(events, "error")
    assert error["name"] == "ContextRestarting"
    assert "signal 9" in error["value"]
    assert "variables of this context are lost" in error["value"]
    assert events[-1]["type"] == "end_of_execution"
    assert await guest.value("'os' in globals()") == "False"
    assert Path(f"/proc/{pid}").exists()
    await guest.run(f"import os\nos.kill({pid}, 9)")


async def test_a_kernel_that_died_unseen_is_confessed_before_any_code_runs(guest: Guest) -> None:
    """Variables are never lost in silence."""
    code = """
import os, pathlib, threading, time
def die():
    while not pathlib.Path("die").exists(): time.sleep(0.01)
    os._exit(3)
threading.Thread(target=die).start()
os.getpid()
"""
    pid = int(await guest.value(code))
    (guest.cwd / "die").touch()
    await gone(pid)

    (error,) = of_type(events := await guest.run("open('must-not-be', 'w')"), "error")
    assert error["name"] == "ContextRestarting"
    assert "exit code 3" in error["value"]
    assert "not run" in error["value"]
    assert events[-1]["type"] == "end_of_execution"
    assert not (guest.cwd / "must-not-be").exists()
    assert await guest.value("1") == "1"


async def test_a_death_that_nobody_was_there_to_hear_of_is_told_to_the_next_caller(guest: Guest) -> None:
    await leave(
        guest,
        """
import os
try:
    print('running', flush=True)
    while True: pass
except KeyboardInterrupt: os._exit(4)
""",
    )

    (error,) = of_type(await guest.run("1"), "error")
    assert error["name"] == "ContextRestarting"
    assert "exit code 4" in error["value"]


async def test_a_loss_that_did_not_reach_its_caller_is_told_again(guest: Guest) -> None:
    """Only what has been sent counts as told: here the caller leaves with the event still in the queue."""
    out = Outlet(maxsize=8)
    job = (await guest.contexts.default()).start("import os\nos.kill(os.getpid(), 9)", {}, out)
    try:
        async with asyncio.timeout(20):
            seen = [await out.get()]
            while seen[-1] is not ENDED:
                seen.append(await out.get())
    finally:
        job.cancel()
    assert of_type(seen, "error")[0]["name"] == "ContextRestarting"

    (error,) = of_type(await guest.run("1"), "error")
    assert error["name"] == "ContextRestarting"


async def test_threads_may_print_for_as_long_as_they_like_between_executions(guest: Guest) -> None:
    """What they print is thrown away: it neither piles up in memory nor stops them when the queues are full."""
    code = """
import pathlib, threading
def chat():
    for number in range(150): print("x" * 1_000_000)
    pathlib.Path("chatted").touch()
threading.Thread(target=chat).start()
"""
    await guest.run(code)
    async with asyncio.timeout(20):
        while not (guest.cwd / "chatted").exists():
            await asyncio.sleep(0.01)
