"""The catalogue for any loop that calls tools by name: JSON schemas, and one coroutine that does what a model asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ValidationError

from sandbox_tools import telemetry
from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools.artifacts import Artifacts
from sandbox_tools.tools.catalog import choose
from sandbox_tools.tools.render import Rendered, RetryableByModel
from sandbox_tools.tools.tool import Emit, what_to_change


async def _unheard(piece: dict[str, Any]) -> None:
    """Takes live output for nobody."""


class Registry:
    """The tools of one registry of sessions, by name.

    There are no turns here unless the caller has some (`sessions.session(thread, owner=...).turn()`): without, each
    call's end begins an idle period, after which the policy pauses.

    Args:
        sessions: Whose sandbox is whose. It is not closed with this.
        tools, artifacts, renamed, described: As for `SandboxToolkit`.

    Raises:
        ConfigError: There is no tool of such a name, or two would have the same.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        tools: Iterable[str] | None = None,
        artifacts: Artifacts | None = None,
        renamed: Mapping[str, str] | None = None,
        described: Mapping[str, str] | None = None,
    ) -> None:
        chosen = choose(tools, artifacts=artifacts, renamed=renamed, described=described)
        self.sessions = sessions
        self.tools = {tool.name: tool for tool in chosen}

    def schemas(self, style: Literal["openai", "anthropic"]) -> list[dict[str, Any]]:
        """The tools as OpenAI's `tools` (of chat completions) or Anthropic's `tools` (of messages) take them."""
        described = []
        for tool in self.tools.values():
            named, schema = {"name": tool.name, "description": tool.description}, tool.schema()
            if style == "openai":
                described.append({"type": "function", "function": {**named, "parameters": schema}})
            else:
                described.append({**named, "input_schema": schema})
        return described

    async def dispatch(
        self, name: str, arguments: Mapping[str, Any], *, thread: str, owner: str = "default", emit: Emit = _unheard
    ) -> Rendered:
        """Do what the model asks; both `thread` and `owner` come from the application, never from the model.

        Args:
            emit: Takes live output.

        Returns:
            Blocks for the model, and plain data for the program.

        Raises:
            RetryableByModel: Nothing was done; its text is for the model, and says what to change.
            SandboxError: Only the operator can help.
        """
        with telemetry.span("gen_ai.execute_tool", {"thread_id": thread}, tool=name):
            return await self.call(self.sessions.session(thread, owner=owner), name, arguments, emit)

    async def call(self, session: Session, name: str, arguments: Mapping[str, Any], emit: Emit) -> Rendered:
        """As `dispatch`, for a session at hand and under a span that somebody else has opened."""
        tool = self.tools.get(name)
        if tool is None:
            msg = f"There is no tool {name!r}. There are: {', '.join(self.tools)}."
            raise RetryableByModel(msg)
        try:
            valid = tool.arguments.model_validate(arguments)
        except ValidationError as error:
            raise RetryableByModel(what_to_change(error)) from error
        return await tool(session, valid, emit)
