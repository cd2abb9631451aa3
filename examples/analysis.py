"""A data analyst over three turns and a restart: its words wait in a SQLite checkpoint, its computer in a snapshot.

Needs `pip install langgraph-checkpoint-sqlite`. The third turn runs in a process of its own, which finds both again.
With a key for a chat model in the environment that model answers; with none a script does, and all else is as real.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from models import choose_model

from sandbox_tools import Artifacts, PauseAfter, SandboxMiddleware, Sessions
from sandbox_tools.testing import call

LOAD = """\
import pandas as pd
sales = pd.DataFrame({"city": ["Oslo", "Turku", "Oslo", "Bergen"], "sold": [3, 5, 8, 2]})
sales
"""

BEST = """\
best = sales.groupby("city").sold.sum().sort_values(ascending=False)
best.to_frame()
"""

DRAW = """\
import matplotlib.pyplot as plt
best.plot.bar(title="Sold")
plt.savefig("sold.png")
plt.show()
"""

TURNS = [
    ("Load the sales.", [call("run_code", code=LOAD), "Four rows are loaded."]),
    ("Which city sells best?", [call("run_code", code=BEST), "Oslo, with 11."]),
    (
        "Draw it, and give me the picture.",
        [call("run_code", code=DRAW), call("download_file", path="sold.png"), "Here it is."],
    ),
]
RESTART = 2
"""Before which turn the process ends."""


async def turn(number: int, thread: str, place: Path) -> None:
    """One turn of the conversation."""
    question, script = TURNS[number]
    artifacts = Artifacts(place / "artifacts")
    checkpoints = AsyncSqliteSaver.from_conn_string(str(place / "checkpoints.db"))
    async with Sessions(policy=PauseAfter(0)) as sessions, checkpoints as checkpointer:
        sandbox = SandboxMiddleware(sessions, artifacts=artifacts)
        agent = create_agent(choose_model(script), middleware=[sandbox], checkpointer=checkpointer)
        agent = sandbox.watch(agent)
        print(f"You: {question}", flush=True)
        config = {"configurable": {"thread_id": thread}}
        async for update in agent.astream({"messages": [("user", question)]}, config, stream_mode="updates"):
            for message in (message for part in update.values() for message in (part or {}).get("messages", [])):
                show(message)
    for file in sorted(artifacts.directory("default", thread).glob("*")):
        print(f"[{file.name} is yours: {file.stat().st_size} bytes.]")


def show(message: object) -> None:
    if isinstance(message, ToolMessage):
        kinds = [block["type"] for block in message.content_blocks]
        print(message.text or f"[{kinds.count('image')} image]")
    elif isinstance(message, AIMessage) and message.text:
        print(f"Agent: {message.text}")


async def forget(thread: str) -> None:
    """End its sandbox."""
    async with Sessions() as sessions:
        await sessions.session(thread).kill()


def main() -> None:
    """All turns, the last one in another process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--thread", default=f"analysis-{secrets.token_hex(4)}", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn is not None:
        asyncio.run(turn(arguments.turn, arguments.thread, arguments.place))
        return

    with tempfile.TemporaryDirectory() as place:
        for number in range(RESTART):
            asyncio.run(turn(number, arguments.thread, Path(place)))
        print("[The process ends here; another one goes on.]", flush=True)
        words = [sys.executable, __file__, "--thread", arguments.thread, "--place", place, "--turn", str(RESTART)]
        subprocess.run(words, check=True)
        asyncio.run(forget(arguments.thread))


if __name__ == "__main__":
    main()
