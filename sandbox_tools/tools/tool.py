"""What a tool is: a name, what the model is told of it, its arguments, and what it does to a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

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
