"""A conversation end to end: agent, tools, session, client, engine and gVisor, all real but for the model."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest
from langchain.agents import create_agent
from langchain_core.messages import ToolMessage

from sandbox_tools import Client, PauseAfter, SandboxCallback, SandboxToolkit, Sessions
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.testing import ScriptedModel, call

TURN = """
import asyncio, os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from langchain.agents import create_agent
from sandbox_tools import Client, PauseAfter, SandboxCallback, SandboxToolkit, Sessions
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.testing import ScriptedModel, call

async def main(state, code, idle):
    bindings = SqliteBindings(state / "sessions.db")
    async with Client(provider="local", state_dir=state) as client:
        async with Sessions(client, bindings=bindings, policy=PauseAfter(idle)) as sessions:
            model = ScriptedModel(script=[call("run_code", code=code), "done"])
            agent = create_agent(model, SandboxToolkit(sessions).get_tools())
            agent = agent.with_config(callbacks=[SandboxCallback(sessions)])
            await agent.ainvoke({"messages": [("user", "go")]}, {"configurable": {"thread_id": "two processes"}})
            print(model.asked[-1][-1].text)
            while idle:
                [info] = [info async for info in client.list()]
                if (info.end_at - datetime.now(UTC)).total_seconds() < 100:  # the turn has ended, the pause is to come
                    os.kill(os.getpid(), signal.SIGKILL)
                await asyncio.sleep(0.01)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
"""

BEGIN = """
import subprocess
child = subprocess.Popen(["sleep", "1000"])
words = ["kept"]
print(child.pid)
"""


def one_turn(engine, code, *, killed_while_idle_for=0):
    command = [sys.executable, "-c", TURN, str(engine.state), code, str(killed_while_idle_for)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == (-signal.SIGKILL if killed_while_idle_for else 0), ended.stderr
    return ended.stdout.strip()


async def states(client):
    return [info.state async for info in client.list()]


@pytest.fixture
async def client(engine):
    async with Client(provider="local", state_dir=engine.state) as client:
        yield client
        async for info in client.list():
            await client.kill(info.sandbox_id)


@pytest.fixture
async def sessions(engine, client):
    bindings = SqliteBindings(engine.state / "sessions.db")
    async with Sessions(client, bindings=bindings, policy=PauseAfter(0)) as sessions:
        yield sessions
    await bindings.aclose()


async def answers(sessions, thread, *script):
    """What the tools answered in one turn."""
    model = ScriptedModel(script=[*script, "done"])
    agent = create_agent(model, SandboxToolkit(sessions).get_tools())
    agent = agent.with_config(callbacks=[SandboxCallback(sessions)])
    await agent.ainvoke({"messages": [("user", "go")]}, {"configurable": {"thread_id": thread}})
    return [message for message in model.asked[-1] if isinstance(message, ToolMessage)]


async def test_a_second_process_finds_variables_and_processes_where_the_first_left_them(engine, client):
    pid = await asyncio.to_thread(one_turn, engine, BEGIN)
    assert await states(client) == ["paused"]
    again = await asyncio.to_thread(one_turn, engine, "print(words, child.pid, child.poll())")
    assert again == f"['kept'] {pid} None"


async def test_a_process_killed_between_turn_end_and_pause_loses_nothing(engine, client):
    """The net under every other layer: the server's own timer was set to pause soon after the turn's end."""
    await asyncio.to_thread(one_turn, engine, BEGIN, killed_while_idle_for=60)

    [left] = [info async for info in client.list()]
    assert left.state == "running"
    assert left.lifecycle.on_timeout == "pause"
    await client.set_timeout(left.sandbox_id, 0)  # as if that time were over
    async with asyncio.timeout(60):
        while await states(client) != ["paused"]:
            await asyncio.sleep(0.05)

    assert await asyncio.to_thread(one_turn, engine, "print(words, child.poll())") == "['kept'] None"


async def test_code_past_its_timeout_is_interrupted_and_its_variables_are_kept(sessions):
    long = "n = 0\nprint('begun', flush=True)\nimport time\nwhile True:\n    n += 1\n    time.sleep(0.01)"
    late, after = await answers(
        sessions, "late", call("run_code", code=long, timeout=2), call("run_code", code="print(n > 10)")
    )
    assert "interrupted after 2 s" in late.text
    assert late.text.endswith("begun")
    assert after.text == "True"


async def test_a_dead_kernel_is_said_in_words_and_the_files_live_on(sessions):
    deadly = "open('note', 'w').write('here'); import os; os.kill(os.getpid(), 9)"
    dead, after = await answers(
        sessions, "dead", call("run_code", code=deadly), call("run_code", code="print(open('note').read())")
    )
    assert "kernel died" in dead.text
    assert after.text == "here"


async def test_a_sandbox_killed_between_turns_is_told_as_lost(sessions, client):
    await answers(sessions, "gone", call("run_code", code="x = 1"))
    async for info in client.list():
        await client.kill(info.sandbox_id)
    (answer,) = await answers(sessions, "gone", call("run_code", code="print('x' in globals())"))
    assert "lost" in answer.text
    assert answer.text.endswith("False")


async def test_a_plot_reaches_the_model_as_an_image(sessions):
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()"
    (answer,) = await answers(sessions, "plot", call("run_code", code=code))
    assert [block["type"] for block in answer.content_blocks] == ["image"]


async def test_a_cancelled_turn_interrupts_the_code_and_lets_the_sandbox_sleep(sessions, client):
    code = "import time\nfor n in range(10**6):\n    print(n, flush=True)\n    time.sleep(0.05)"
    model = ScriptedModel(script=[call("run_code", code=code), "done"])
    agent = create_agent(model, SandboxToolkit(sessions).get_tools())
    agent = agent.with_config(callbacks=[SandboxCallback(sessions)])
    config = {"configurable": {"thread_id": "cancelled"}}

    async def watch():
        async for event in agent.astream_events({"messages": [("user", "go")]}, config, version="v2"):
            if event["event"] == "on_custom_event":
                heard.set()

    heard = asyncio.Event()
    turn = asyncio.create_task(watch())
    async with asyncio.timeout(60):
        await heard.wait()
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        while sessions._tasks:
            await asyncio.wait(sessions._tasks)
    assert await states(client) == ["paused"]
    (answer,) = await answers(sessions, "cancelled", call("run_code", code="print(n < 10**5)"))
    assert answer.text == "True"
