"""A graph of your own with a sandbox: no agent, a model node and a tool node, and a computer that waits between turns.

With a key for a chat model in the environment that model answers; with none a script does, and all else is as real.
"""

from __future__ import annotations

import asyncio
import secrets

from langchain_core.messages import ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from models import choose_model

from sandbox_tools import PauseAfter, SandboxCallback, SandboxToolkit, Sessions
from sandbox_tools.testing import call

QUESTIONS = ("Which primes are there below 30? Keep them.", "What is their sum?")

SCRIPT = [
    call("run_code", code="primes = [n for n in range(2, 30) if all(n % d for d in range(2, n))]\nprimes"),
    "There are ten of them; I have kept them.",
    call("run_code", code="sum(primes)"),
    "Their sum is 129.",
]


async def main() -> None:
    """Two turns, between which the sandbox is paused."""
    config = {"configurable": {"thread_id": f"graph-{secrets.token_hex(4)}"}}
    async with Sessions(policy=PauseAfter(0)) as sessions:
        toolkit = SandboxToolkit(sessions, tools=["run_code"])
        tools = toolkit.get_tools()
        model = choose_model(SCRIPT).bind_tools(tools)

        async def answer(state: MessagesState) -> dict[str, list[object]]:
            return {"messages": [await model.ainvoke(state["messages"])]}

        def route(state: MessagesState) -> str:
            return "tools" if state["messages"][-1].tool_calls else END

        graph = StateGraph(MessagesState)
        graph.add_node("model", answer)
        graph.add_node("tools", ToolNode(tools, awrap_tool_call=toolkit.awrap_tool_call))
        graph.add_edge(START, "model")
        graph.add_conditional_edges("model", route)
        graph.add_edge("tools", "model")
        agent = graph.compile(checkpointer=InMemorySaver()).with_config(callbacks=[SandboxCallback(sessions)])

        for question in QUESTIONS:
            print(f"You: {question}")
            async for update in agent.astream({"messages": [("user", question)]}, config, stream_mode="updates"):
                for message in (message for part in update.values() for message in part["messages"]):
                    who = "Sandbox" if isinstance(message, ToolMessage) else "Agent"
                    if message.text:
                        print(f"{who}: {message.text}")
        await sessions.session(config["configurable"]["thread_id"]).kill()


if __name__ == "__main__":
    asyncio.run(main())
