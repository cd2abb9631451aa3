"""A chat with a real model that has a sandbox; run it with `make chat`, and again with `--thread` to go on later.

The model is the first for which the environment holds a key; its LangChain package must be installed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys

from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from rich.console import Console

from sandbox_tools import PauseAfter, SandboxCallback, SandboxToolkit, Sessions

MODELS = {
    "ANTHROPIC_API_KEY": "anthropic:claude-sonnet-4-5",
    "OPENAI_API_KEY": "openai:gpt-5",
    "GOOGLE_API_KEY": "google_genai:gemini-2.5-pro",
}

console = Console()


def choose_model(name: str | None) -> BaseChatModel:
    """The model asked for, else the first that the environment has a key for; leaves with words where there is none."""
    chosen = name or next((model for key, model in MODELS.items() if os.environ.get(key)), None)
    if chosen is None:
        sys.exit(f"No key for a chat model. Set one of {', '.join(MODELS)}, or see `make demo`, which needs none.")
    try:
        return init_chat_model(chosen)
    except ImportError as error:
        sys.exit(f"{chosen} needs another package: {error}")


async def chat(model: BaseChatModel, thread: str) -> None:
    """One turn for each line that is typed."""
    async with Sessions(policy=PauseAfter(10)) as sessions:
        tools = SandboxToolkit(sessions).get_tools()
        agent = create_agent(model, tools, checkpointer=InMemorySaver())
        agent = agent.with_config(callbacks=[SandboxCallback(sessions)])
        console.print(f"Thread {thread}. An empty line ends the chat; the sandbox is kept for `--thread {thread}`.")
        while question := (await asyncio.to_thread(console.input, "[bold]You:[/bold] ")).strip():
            messages = {"messages": [("user", question)]}
            async for update in agent.astream(messages, {"configurable": {"thread_id": thread}}, stream_mode="updates"):
                for message in (message for part in update.values() for message in part["messages"]):
                    show(message)


def show(message: object) -> None:
    if isinstance(message, ToolMessage):
        console.print(message.text[:2000], style="green", markup=False)
    elif isinstance(message, AIMessage):
        for tool_call in message.tool_calls:
            console.print(tool_call["args"].get("code") or tool_call["name"], style="blue", markup=False)
        if message.text:
            console.print("[bold]Agent:[/bold]", message.text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="such as provider:name, as LangChain's init_chat_model takes it")
    parser.add_argument("--thread", default=f"chat-{secrets.token_hex(4)}", help="a conversation to go on with")
    arguments = parser.parse_args()
    asyncio.run(chat(choose_model(arguments.model), arguments.thread))
