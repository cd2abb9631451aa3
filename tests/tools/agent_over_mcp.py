"""A scripted agent that has our tools through LangChain's MCP client; run in the environment that this needs."""

from __future__ import annotations

import asyncio
import sys
import warnings

warnings.simplefilter("ignore")

from langchain.agents import create_agent  # noqa: E402
from langchain.mcp import MCPAdapter  # noqa: E402
from langchain_core.messages import ToolMessage  # noqa: E402

from sandbox_tools.testing import ScriptedModel, call  # noqa: E402


async def main(url: str) -> None:
    script = [
        call("run_code", code="x = 41"),
        call("run_code", code="print(x + 1)"),
        call("run_code", code="x", owner="somebody else"),
        "done",
    ]
    async with MCPAdapter(url) as adapter:
        model = ScriptedModel(script=script)
        agent = create_agent(model, await adapter.list_tools())
        await agent.ainvoke({"messages": [("user", "go")]})
    for message in model.asked[-1]:
        if isinstance(message, ToolMessage):
            print(message.status, message.text.replace("\n", " "))  # noqa: T201


asyncio.run(main(sys.argv[1]))
