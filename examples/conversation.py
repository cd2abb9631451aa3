"""One conversation in two processes: its sandbox sleeps on disk while the user is away, and wakes as it was.

Run it with `make demo`. The model is scripted, so that no key is needed; all else is real: the agent, the tools, the
engine, the isolation, the snapshot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from sandbox_tools import Client, PauseAfter, SandboxCallback, SandboxToolkit, Sessions
from sandbox_tools.models import SandboxInfo
from sandbox_tools.testing import ScriptedModel, call

AWAY = 5
"""Seconds the user is away between the two turns."""

LOAD = """\
import pandas as pd
sales = pd.DataFrame({"city": ["Oslo", "Turku", "Oslo", "Bergen"], "sold": [3, 5, 8, 2]})
sales.groupby("city").sold.sum()
"""

COUNT = """\
import os, time
for n in range(10**9):
    with open("new", "w") as file:
        file.write(str(n))
    os.replace("new", "count")
    time.sleep(0.1)
"""

START = f"""\
import subprocess, sys
open("count", "w").write("0")
worker = subprocess.Popen([sys.executable, "-c", {COUNT!r}])
open("notes.txt", "w").write("Oslo sells best.")
print("background process", worker.pid)
"""

PLOT = """\
import matplotlib.pyplot as plt
sales.groupby("city").sold.sum().plot.bar(title="Sold")
plt.show()
"""

LOOK = """\
import json

def look():
    print(json.dumps({"rows": len(sales), "notes": open("notes.txt").read(), "pid": worker.pid,
                      "alive": worker.poll() is None, "count": int(open("count").read())}))

look()
"""

SCRIPTS = {
    1: [
        call("run_code", code=LOAD),
        call("run_code", code=START),
        call("run_code", code=PLOT),
        call("run_code", code=LOOK),
        AIMessage("The frame is loaded, the counter runs, the note is written and the plot is drawn."),
    ],
    2: [
        call("run_code", code="look()"),
        call("pause_sandbox"),
        call("list_paused_sandboxes"),
        call("resume_sandbox"),
        call("run_code", code="look()"),
        AIMessage("Everything is where we left it."),
    ],
}

QUESTIONS = {1: "Load the sales, start the counter, note the best city and plot it.", 2: "Is it all still there?"}

console = Console()


def main() -> int:
    """Both turns, each in a process of its own; 0 if the sandbox came back as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turn", type=int, choices=(1, 2), help=argparse.SUPPRESS)
    parser.add_argument("--thread", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        asyncio.run(turn(arguments.turn, arguments.thread, arguments.report))
        return 0

    thread = f"demo-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        report.write_text("[]")
        try:
            run_turn(1, thread, report)
            with console.status(f"The user is away for {AWAY} s; nothing of the conversation runs"):
                time.sleep(AWAY)
            run_turn(2, thread, report)
        except subprocess.CalledProcessError as error:
            console.print(f"[red]Turn failed with exit code {error.returncode}; its own words are above.[/red]")
            asyncio.run(clean_up(thread))
            return 1

        steps = json.loads(report.read_text())
    return conclude(steps)


def run_turn(number: int, thread: str, report: Path) -> None:
    """Run one turn in a new process."""
    words = [sys.executable, __file__, "--turn", str(number), "--thread", thread, "--report", str(report)]
    subprocess.run(words, check=True)


async def turn(number: int, thread: str, report: Path) -> None:
    """What an application does for one message of its user."""
    console.rule(f"Turn {number}, process {os.getpid()}, thread {thread}")
    console.print(f"[bold]User:[/bold] {QUESTIONS[number]}")
    steps: list[dict[str, Any]] = []
    async with Client() as client, Sessions(client, policy=PauseAfter(0)) as sessions:
        agent = create_agent(ScriptedModel(script=SCRIPTS[number]), SandboxToolkit(sessions).get_tools())
        agent = agent.with_config(callbacks=[SandboxCallback(sessions)])
        spoke = began = time.monotonic()
        async for message in talk(agent, QUESTIONS[number], thread):
            if isinstance(message, ToolMessage):
                seconds = time.monotonic() - began
                steps.append(await step(client, thread, str(message.name), seconds, show_answer(message)))
            elif message.tool_calls:
                show_call(message)
            else:
                console.print(f"[bold]Agent:[/bold] {message.text}")
                spoke = time.monotonic()
            began = time.monotonic()

        await asleep(client, thread)
        steps.append(await step(client, thread, "turn end: pause", time.monotonic() - spoke, ""))
        if number == 2:
            await sessions.session(thread).kill()
            console.print("The sandbox is killed; nothing of it is left.")

    for made in steps:
        made["turn"] = number
    report.write_text(json.dumps(json.loads(report.read_text()) + steps))


async def talk(agent: Any, question: str, thread: str) -> AsyncIterator[AIMessage | ToolMessage]:
    """One run of the agent, message by message."""
    config = {"configurable": {"thread_id": thread}}
    with console.status("The agent works"):
        async for update in agent.astream({"messages": [("user", question)]}, config, stream_mode="updates"):
            for part in update.values():
                for message in part["messages"]:
                    yield message


def show_call(message: AIMessage) -> None:
    [tool_call] = message.tool_calls
    code = tool_call["args"].get("code")
    body = Syntax(code.strip(), "python", word_wrap=True) if code else ""
    console.print(Panel(body, title=f"The model calls {tool_call['name']}", border_style="blue"))


def show_answer(message: ToolMessage) -> str:
    """Draw a tool's answer; its text. Leaves with it where the tool failed."""
    blocks = message.content_blocks
    text = "\n".join(block["text"] for block in blocks if block["type"] == "text").strip()
    images = [f"an image for the model: {block['mime_type']}" for block in blocks if block["type"] == "image"]
    body = Text("\n".join([text, *images]).strip())
    console.print(Panel(body, title=f"{message.name} answers", border_style="green"))
    if message.status == "error":
        sys.exit(f"The tool {message.name} failed.")

    return text


async def step(client: Client, thread: str, name: str, seconds: float, text: str) -> dict[str, Any]:
    """A row of the report: what was done, how long it took, and where the sandbox stands after it."""
    info = await sandbox_of(client, thread)
    return {
        "step": name,
        "seconds": seconds,
        "text": text,
        "state": info.state,
        "ram": info.resident_bytes,
        "disk": info.snapshot_bytes,
    }


async def asleep(client: Client, thread: str) -> None:
    """Wait for the pause that the turn's end has set off behind the agent's back."""
    async with asyncio.timeout(30):
        while not (await sandbox_of(client, thread)).snapshot_bytes:  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)


async def sandbox_of(client: Client, thread: str) -> SandboxInfo:
    """The thread's sandbox, found by the stamp that the session has put on it; an application never needs to."""
    [found] = [info async for info in client.list() if thread in info.metadata.values()]
    return await client.info(found.sandbox_id)


async def clean_up(thread: str) -> None:
    """After a failed turn: leave no sandbox behind."""
    async with Sessions() as sessions:
        await sessions.session(thread).kill()


def conclude(steps: list[dict[str, Any]]) -> int:
    """Draw what each step took; 0 if the sandbox slept between the turns and the looks into it agree."""
    table = Table("turn", "step", "seconds", "then", "MB of RAM", "MB on disk", title="What it took")
    for made in steps:
        sizes = ("?" if made[key] is None else f"{made[key] / 1e6:.0f}" for key in ("ram", "disk"))
        table.add_row(str(made["turn"]), made["step"], f"{made['seconds']:.2f}", made["state"], *sizes)
    console.print(table)

    looks = [json.loads(made["text"]) for made in steps if made["text"].startswith('{"rows"')]
    if len(looks) != 3:
        console.print("[red]A look into the sandbox failed; its answer is above.[/red]")
        return 1

    before, after, again = looks
    kept = all(before[key] == after[key] == again[key] for key in ("rows", "notes", "pid", "alive")) and before["alive"]
    # It counts ten times a second: awake all the while, it would have come this much further.
    slept = before["count"] <= after["count"] < before["count"] + AWAY * 10 and after["count"] <= again["count"]
    freed = all((made["state"], made["ram"]) == ("paused", 0) for made in steps if made["step"].startswith("turn end"))
    counts = f"{before['count']}, {after['count']}, {again['count']}"
    for claim, holds in {
        f"The same frame, note and process {after['pid']}": kept,
        f"It counted only while awake ({counts})": slept,
        "At each turn's end it was paused and held no RAM": freed,
    }.items():
        console.print(f"{claim}: {'[green]yes' if holds else '[red]NO'}")
    return 0 if kept and slept and freed else 1


if __name__ == "__main__":
    sys.exit(main())
