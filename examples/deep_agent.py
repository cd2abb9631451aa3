"""A deep agent whose computer sleeps between two turns: its files, and the server that it left running, wake with it.

Needs `pip install 'sandbox-tools[local,deepagents]'`. With a key for a chat model in the environment that model
answers; with none a script does, and all else is as real.
"""

from __future__ import annotations

import asyncio
import os
import secrets

from deepagents import create_deep_agent
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver

from sandbox_tools import Client, PauseAfter, SandboxCallback, Sessions
from sandbox_tools.testing import ScriptedModel, call
from sandbox_tools.tools.deepagents import SandboxBackend

MODELS = {"ANTHROPIC_API_KEY": "anthropic:claude-sonnet-4-5", "GOOGLE_API_KEY": "google_genai:gemini-2.5-pro"}

QUESTIONS = (
    "Write a poem of 42 lines to poem.txt in your home directory, and serve it on port 8000 in the background.",
    "How many lines has the poem that your server serves?",
)

SCRIPT = [
    call("write_file", file_path="/home/user/poem.txt", content="".join(f"line {n}\n" for n in range(1, 43))),
    call("execute", command="nohup python -m http.server 8000 >server.log 2>&1 & echo it runs as $!"),
    "It is written, and served on port 8000.",
    call("execute", command="curl -s localhost:8000/poem.txt | wc -l"),
    "The server serves a poem of 42 lines.",
]


def choose_model() -> BaseChatModel:
    """The first model that there is a key for, else one that says its script."""
    chosen = next((model for key, model in MODELS.items() if os.environ.get(key)), None)
    return init_chat_model(chosen) if chosen else ScriptedModel(script=SCRIPT)


async def main() -> None:
    """Two turns of one conversation, and what has become of its sandbox after each."""
    thread = f"poem-{secrets.token_hex(4)}"
    config = {"configurable": {"thread_id": thread}}
    async with Client() as client, Sessions(client, policy=PauseAfter(0)) as sessions:
        agent = create_deep_agent(choose_model(), backend=SandboxBackend(sessions), checkpointer=InMemorySaver())
        agent = agent.with_config(callbacks=[SandboxCallback(sessions)])
        for question in QUESTIONS:
            print(f"\nYou: {question}")
            async for update in agent.astream({"messages": [("user", question)]}, config, stream_mode="updates"):
                for part in update.values():
                    for message in (part or {}).get("messages", []):
                        show(message)
            print(f"[The sandbox is {await settled(client, thread)}.]")
        await sessions.session(thread).kill()


async def settled(client: Client, thread: str) -> str:
    """The state of its sandbox, once what follows the turn is done."""
    while True:
        info = await anext(client.list(metadata={"sandbox_tools.thread": thread}))
        if info.state != "running":
            return info.state
        await asyncio.sleep(0.1)


def show(message: object) -> None:
    """One line for each step."""
    if isinstance(message, ToolMessage):
        print(f"  -> {message.text.strip()[:300]}")
    elif isinstance(message, AIMessage):
        for tool_call in message.tool_calls:
            arguments = tool_call["args"]
            print(f"  {tool_call['name']} {arguments.get('command') or arguments.get('file_path') or ''}")
        if message.text:
            print(f"Agent: {message.text}")


if __name__ == "__main__":
    asyncio.run(main())
