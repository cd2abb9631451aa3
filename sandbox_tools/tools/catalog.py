"""Each tool once: its name, what the model is told of it, its arguments, and what it does to a session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sandbox_tools.errors import ExecutionTimeoutError, SandboxError
from sandbox_tools.models import ExecutionEvent, Stderr, Stdout
from sandbox_tools.session.session import Session
from sandbox_tools.tools.render import (
    Rendered,
    capped,
    render,
    render_error,
    render_lost,
    render_paused,
    render_timeout,
)

Emit = Callable[[dict[str, Any]], Awaitable[None]]
"""Takes one piece of live output: `stream` and `text`."""

BACKLOG = 256
"""Pieces of live output that may wait for a slow listener; more are dropped, the result has them all the same."""

SLOW = 5.0
"""Seconds a result waits for the listener to take what is left."""

log = logging.getLogger("sandbox_tools.tools")


class Arguments(BaseModel):
    """What the model sends; a name it made up is an error it reads."""

    model_config = ConfigDict(extra="forbid")


class RunCode(Arguments):
    """Arguments of `run_code`."""

    code: str = Field(description="Python code. The value of its last expression is shown, and so are plots.")
    timeout: float = Field(default=120, gt=0, le=3600, description="Seconds after which the code is interrupted.")


class OwnOrHandle(Arguments):
    """Arguments of `pause_sandbox` and `resume_sandbox`."""

    handle: str | None = Field(default=None, description="Which sandbox. Leave it out for your own.")


class Nothing(Arguments):
    """No arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One entry.

    Attributes:
        call: Gets the session, validated arguments and where live output goes.
    """

    name: str
    description: str
    arguments: type[Arguments]
    call: Callable[[Session, Any, Emit], Awaitable[Rendered]]

    async def __call__(self, session: Session, arguments: Arguments, emit: Emit) -> Rendered:
        """Do it, and say in words what went wrong where the model can use the words.

        Raises:
            RetryableByModel: The model may call again, as the message says.
            SandboxError: Only the operator can help.
        """
        try:
            rendered = await self.call(session, arguments, emit)
        except SandboxError as error:
            rendered = render_error(error)
        if lost := await session.take_lost():
            told = Rendered.of(render_lost(lost)).blocks
            return Rendered(blocks=[*told, *rendered.blocks], artifact=rendered.artifact)
        return rendered


async def _run_code(session: Session, arguments: RunCode, emit: Emit) -> Rendered:
    async with session.lease() as sandbox, _live(emit) as on_event:
        try:
            execution = await sandbox.run_code(arguments.code, timeout=arguments.timeout, on_event=on_event)
        except ExecutionTimeoutError as error:
            return render_timeout(error, arguments.timeout)
    return render(execution)


async def _pause(session: Session, arguments: OwnOrHandle, emit: Emit) -> Rendered:
    handle = await session.pause(arguments.handle)
    if handle is None:
        return Rendered.of("There is no sandbox to pause: the first `run_code` creates it.")
    kept = "Its variables, processes and files are kept; the next `run_code` or `resume_sandbox` wakes it."
    return Rendered.of(f"Paused {handle}. {kept}", handle=handle)


async def _resume(session: Session, arguments: OwnOrHandle, emit: Emit) -> Rendered:
    handle = await session.resume(arguments.handle)
    if handle is None:
        return Rendered.of("There is no sandbox to resume: the first `run_code` creates it.")
    return Rendered.of(f"Resumed {handle}. It is now the sandbox that `run_code` uses.", handle=handle)


async def _list(session: Session, arguments: Nothing, emit: Emit) -> Rendered:
    return render_paused(await session.list_paused())


@contextlib.asynccontextmanager
async def _live(emit: Emit) -> AsyncIterator[Callable[[ExecutionEvent], None]]:
    """Hands output on while the code runs; the code never waits for whoever listens."""
    waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(BACKLOG)

    def on_event(event: ExecutionEvent) -> None:
        if isinstance(event, (Stdout, Stderr)) and not waiting.full():
            waiting.put_nowait({"stream": event.type, "text": capped(event.text)})

    async def hand_on() -> None:
        while True:
            piece = await waiting.get()
            try:
                await emit(piece)
            except Exception:
                log.warning("a listener of live output failed", exc_info=True)
            finally:
                waiting.task_done()

    handing = asyncio.create_task(hand_on())
    try:
        yield on_event
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SLOW):
                await waiting.join()
    finally:
        handing.cancel()
        await asyncio.wait([handing])


CATALOG: tuple[Tool, ...] = (
    Tool(
        name="run_code",
        description=(
            "Run Python code in your own sandbox, a Linux machine that lasts as long as the conversation. Variables, "
            "imports, files and background processes are kept from call to call, also while the sandbox is paused "
            "between turns. Returns what the code prints, the value of its last expression, plots as images, or the "
            "traceback. pandas, numpy and matplotlib are there."
        ),
        arguments=RunCode,
        call=_run_code,
    ),
    Tool(
        name="pause_sandbox",
        description=(
            "Pause a sandbox: memory, processes and files are put on disk and wait. Not needed at the end of a turn, "
            "which pauses by itself. Fails while code runs in it."
        ),
        arguments=OwnOrHandle,
        call=_pause,
    ),
    Tool(
        name="resume_sandbox",
        description=(
            "Wake a paused sandbox with everything in it as it was, and use it from now on. With a handle from "
            "`list_paused_sandboxes` this may be one of an earlier conversation. Your own wakes by itself at the next "
            "`run_code`."
        ),
        arguments=OwnOrHandle,
        call=_resume,
    ),
    Tool(
        name="list_paused_sandboxes",
        description="List your paused sandboxes, with the handles that `resume_sandbox` takes.",
        arguments=Nothing,
        call=_list,
    ),
)
