"""What a tool is: a name, what the model is told of it, its arguments, and what it does to a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sandbox_tools import telemetry
from sandbox_tools.errors import SandboxError
from sandbox_tools.session.session import Session
from sandbox_tools.tools.render import Rendered, render_error, render_lost

Emit = Callable[[dict[str, Any]], Awaitable[None]]
"""Takes one piece of live output: `stream` (`stdout`, `stderr` or `progress`) and `text`."""


class Arguments(BaseModel):
    """What the model sends; a name it made up is an error it reads."""

    model_config = ConfigDict(extra="forbid")


class Nothing(Arguments):
    """No arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hints:
    """What a host may want to know before it lets a model call a tool; as MCP's annotations, and as little binding.

    Attributes:
        read_only: It changes nothing.
        destructive: It may undo or delete what is there.
        idempotent: Calling it again with the same arguments does nothing more.
    """

    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One entry of the catalogue.

    Attributes:
        title: What a person sees.
        call: Gets the session, validated arguments and where live output goes.
    """

    name: str
    title: str
    description: str
    arguments: type[Arguments]
    call: Callable[[Session, Any, Emit], Awaitable[Rendered]]
    hints: Hints = field(default_factory=Hints)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments, without what only documents our classes."""
        schema = self.arguments.model_json_schema()
        return {key: value for key, value in schema.items() if key not in ("title", "description")}

    async def __call__(self, session: Session, arguments: Arguments, emit: Emit) -> Rendered:
        """Do it, and say in words what went wrong where the model can use the words.

        Raises:
            RetryableByModel: The model may call again, as the message says.
            SandboxError: Only the operator can help.
        """
        try:
            rendered = await self.call(session, arguments, emit)
        except SandboxError as error:
            telemetry.failed(error)
            rendered = render_error(error)
        if lost := await session.take_lost():
            told = Rendered.of(render_lost(lost)).blocks
            return Rendered(blocks=[*told, *rendered.blocks], artifact=rendered.artifact)
        return rendered


def what_to_change(error: ValidationError) -> str:
    """What was wrong with the arguments, for the model to correct."""
    faults = (f"`{'.'.join(map(str, fault['loc']))}`: {fault['msg']}" for fault in error.errors())
    return f"The arguments are not valid. {'; '.join(faults)}. Correct them and call again."


def question(name: str, arguments: Mapping[str, Any]) -> str:
    """What a person is asked before the tool does anything."""
    if body := arguments.get("code") or arguments.get("command"):
        return f"May this run in the sandbox?\n\n{body}"
    which = f" {arguments['handle']}" if arguments.get("handle") else ""
    return f"May `{name}`{which} be done?"
