"""Pausing, waking, listing and deleting sandboxes; the model names them by handle, and only its owner's."""

from __future__ import annotations

from pydantic import Field

from sandbox_tools.session.session import Session
from sandbox_tools.tools.render import Rendered, render_paused
from sandbox_tools.tools.tool import Arguments, Emit, Hints, Nothing, Tool


class OwnOrHandle(Arguments):
    """Arguments of `pause_sandbox` and `resume_sandbox`."""

    handle: str | None = Field(default=None, description="Which sandbox. Leave it out for your own.")


async def _pause(session: Session, arguments: OwnOrHandle, emit: Emit) -> Rendered:
    handle = await session.pause(arguments.handle)
    if handle is None:
        return Rendered.of("There is no sandbox to pause: the first use creates it.")
    kept = "Its variables, processes and files are kept; the next use or `resume_sandbox` wakes it."
    return Rendered.of(f"Paused {handle}. {kept}", handle=handle)


async def _resume(session: Session, arguments: OwnOrHandle, emit: Emit) -> Rendered:
    handle = await session.resume(arguments.handle)
    if handle is None:
        return Rendered.of("There is no sandbox to resume: the first use creates it.")
    return Rendered.of(f"Resumed {handle}. It is now your sandbox, which all tools use.", handle=handle)


async def _list(session: Session, arguments: Nothing, emit: Emit) -> Rendered:
    return render_paused(await session.list_paused())


async def _delete(session: Session, arguments: Nothing, emit: Emit) -> Rendered:
    if await session.kill():
        return Rendered.of("Deleted your sandbox, its variables, processes and files with it. The next use makes one.")
    return Rendered.of("There is no sandbox to delete.")


PAUSE = Tool(
    name="pause_sandbox",
    title="Pause sandbox",
    description=(
        "Pause a sandbox: memory, processes and files are put on disk and wait. Not needed at the end of a turn, "
        "which pauses by itself. Fails while something runs in it."
    ),
    arguments=OwnOrHandle,
    call=_pause,
    hints=Hints(idempotent=True),
)

RESUME = Tool(
    name="resume_sandbox",
    title="Resume sandbox",
    description=(
        "Wake a paused sandbox with everything in it as it was, and use it from now on. With a handle from "
        "`list_paused_sandboxes` this may be one of an earlier conversation. Your own wakes by itself at its next use."
    ),
    arguments=OwnOrHandle,
    call=_resume,
    hints=Hints(idempotent=True),
)

LIST_PAUSED = Tool(
    name="list_paused_sandboxes",
    title="List paused sandboxes",
    description="List your paused sandboxes, with the handles that `resume_sandbox` takes.",
    arguments=Nothing,
    call=_list,
    hints=Hints(read_only=True, idempotent=True),
)

DELETE = Tool(
    name="delete_sandbox",
    title="Delete sandbox",
    description=(
        "Delete your own sandbox for good: its variables, processes and files are lost. Only when you are asked to, "
        "or when it is beyond repair. Not needed at the end of a conversation, where it is paused and costs nothing."
    ),
    arguments=Nothing,
    call=_delete,
    hints=Hints(destructive=True, idempotent=True),
)
