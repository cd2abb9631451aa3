"""A chatbot with a web page and a computer that waits: answers stream, plots are shown, a badge tells when it sleeps.

`python examples/chatbot.py` serves it at http://127.0.0.1:8080. With a key for a chat model in the environment that
model answers; with none a script does, and all else is as real.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from models import choose_model
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sandbox_tools import AdaptivePause, PauseAfter, SandboxMiddleware, Sessions
from sandbox_tools.testing import call

PAGE = Path(__file__).with_name("chatbot.html")

COOKIE = "visitor"
"""Who somebody is: a name that only this server gives. An application with users has its own."""

DRAW = """\
import matplotlib.pyplot as plt
months, sold = ["Jan", "Feb", "Mar"], [3, 8, 11]
print("drawing", sum(sold), "sales")
plt.bar(months, sold)
plt.title("Sold")
plt.show()
"""

SCRIPT = [
    call("run_code", code=DRAW),
    "March was the best month.",
    call("run_code", code="sum(sold)"),
    "22 in all: the numbers were still there.",
]


class Chatbot:
    """The application: one agent for each conversation, one registry for all sandboxes."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.agents: dict[tuple[str, str], Any] = {}

    def agent(self, owner: str, thread: str) -> Any:
        """The agent of a conversation."""
        if (owner, thread) not in self.agents:
            sandbox = SandboxMiddleware(self.sessions, owner=owner)
            agent = create_agent(choose_model(SCRIPT), middleware=[sandbox], checkpointer=InMemorySaver())
            self.agents[owner, thread] = sandbox.watch(agent)
        return self.agents[owner, thread]

    async def page(self, request: Request) -> Response:
        """The page; a new visitor gets a name."""
        response = FileResponse(PAGE)
        if COOKIE not in request.cookies:
            response.set_cookie(COOKIE, secrets.token_urlsafe(16), httponly=True, samesite="strict")
        return response

    async def chat(self, request: Request) -> Response:
        """One turn: a JSON object a line, as it comes."""
        owner, asked = request.cookies.get(COOKIE), await request.json()
        if not owner:
            return JSONResponse({"error": "Load the page first."}, 401)
        return StreamingResponse(self.turn(owner, asked["thread"], asked["text"]), media_type="application/x-ndjson")

    async def turn(self, owner: str, thread: str, text: str) -> AsyncIterator[str]:
        """What the agent says and its sandbox puts out."""
        config = {"configurable": {"thread_id": thread}}
        messages = {"messages": [("user", text)]}
        stream = self.agent(owner, thread).astream(messages, config, stream_mode=["updates", "custom"])
        async with contextlib.aclosing(stream):
            async for mode, piece in stream:
                for said in live(piece) if mode == "custom" else whole(piece):
                    yield json.dumps(said) + "\n"

    async def status(self, request: Request) -> Response:
        """Whether the conversation's sandbox sleeps, and for how long."""
        owner = request.cookies.get(COOKIE)
        if not owner:
            return JSONResponse({"state": "none"})
        rows = await self.sessions.session(request.query_params["thread"], owner=owner).list_paused()
        own = next((row for row in rows if row.current), None)
        return JSONResponse({"state": "asleep", "seconds": own.age} if own else {"state": "awake"})


def live(piece: dict[str, Any]) -> list[dict[str, str]]:
    return [{"kind": "output", "text": piece["sandbox.output"]["text"]}] if "sandbox.output" in piece else []


def whole(update: dict[str, Any]) -> list[dict[str, str]]:
    said = []
    for message in (message for part in update.values() for message in (part or {}).get("messages", [])):
        if isinstance(message, AIMessage):
            said += [{"kind": "code", "text": each["args"].get("code", each["name"])} for each in message.tool_calls]
            said += [{"kind": "answer", "text": message.text}] if message.text else []
        elif isinstance(message, ToolMessage):
            images = [block for block in message.content_blocks if block["type"] == "image"]
            said += [{"kind": "image", "type": image["mime_type"], "data": image["base64"]} for image in images]
    return said


def application(sessions: Sessions) -> Starlette:
    """The chatbot, whose sandboxes are left to sleep when it stops."""
    bot = Chatbot(sessions)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with sessions:
            yield

    routes = [Route("/", bot.page), Route("/chat", bot.chat, methods=["POST"]), Route("/status", bot.status)]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> None:
    """Serve it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--pause-after", type=float, help="idle seconds until a pause (default: what pays)")
    arguments = parser.parse_args()
    policy = AdaptivePause() if arguments.pause_after is None else PauseAfter(arguments.pause_after)
    uvicorn.run(application(Sessions(policy=policy)), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
