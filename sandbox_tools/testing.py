"""What a test of an agent with a sandbox needs and the real thing cannot give: time to turn, a model that obeys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from pydantic import Field, PrivateAttr


class ManualClock:
    """A clock that moves only when told to.

    Args:
        start: Seconds since the epoch.
    """

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = start
        self._waiting: set[asyncio.Event] = set()

    def time(self) -> float:
        """Seconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let that much time pass, and wake all who wait."""
        self._now += seconds
        for event in self._waiting:
            event.set()

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Wait for the event, or for time to move."""
        if self._now >= until:
            return
        self._waiting.add(event)
        try:
            await event.wait()
        finally:
            self._waiting.discard(event)


def call(name: str, **arguments: Any) -> AIMessage:
    """A model's message that calls one tool."""
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": f"call_{name}"}])


class ScriptedModel(BaseChatModel):
    """A chat model that says its script, one message a call, and keeps what it was asked.

    Args:
        script: What to answer, in order; a string is a final answer.
    """

    script: Sequence[AIMessage | str]
    asked: list[list[BaseMessage]] = Field(default_factory=list)
    """The messages of each call."""
    _next: int = PrivateAttr(default=0)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Runnable[Any, AIMessage]:
        """Itself: the script already knows the tools."""
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        if self._next >= len(self.script):
            msg = f"The script has {len(self.script)} messages and is asked for one more. Add it."
            raise IndexError(msg)
        line = self.script[self._next]
        self._next += 1
        self.asked.append(list(messages))
        message = AIMessage(line) if isinstance(line, str) else line
        return ChatResult(generations=[ChatGeneration(message=message)])
