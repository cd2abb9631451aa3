"""Files of the sandbox: read, written and listed by the model."""

from __future__ import annotations

import base64
import contextlib
import mimetypes
from collections.abc import Iterator
from contextlib import aclosing

from langchain_core.messages.content import create_image_block
from pydantic import Field

from sandbox_tools.client import Sandbox
from sandbox_tools.errors import APIError, NotFoundError, SandboxExpiredError
from sandbox_tools.session.session import Session
from sandbox_tools.tools.render import IMAGE_LIMIT, TEXT_LIMIT, Rendered, RetryableByModel
from sandbox_tools.tools.tool import Arguments, Emit, Hints, Tool

READ_LIMIT = 4_000_000
"""Bytes of a file that is read as a whole; of a longer one its beginning."""

ENTRIES = 200
"""How many files a listing shows."""

IMAGE_TYPES = frozenset(("image/png", "image/jpeg", "image/gif", "image/webp"))


class ReadFile(Arguments):
    """Arguments of `read_file`."""

    path: str = Field(description="Absolute, or from the home directory.")
    first_line: int = Field(default=1, ge=1, description="Where to begin, counted from 1.")
    lines: int = Field(default=500, ge=1, le=5000, description="How many lines.")


class WriteFile(Arguments):
    """Arguments of `write_file`."""

    path: str = Field(description="Absolute, or from the home directory. Directories above it are made.")
    content: str = Field(description="All of the new content, as text.")


class ListFiles(Arguments):
    """Arguments of `list_files`."""

    path: str = Field(default=".", description="A directory: absolute, or from the home directory.")
    depth: int = Field(default=1, ge=1, le=5, description="How many levels.")


async def _read(session: Session, arguments: ReadFile, emit: Emit) -> Rendered:
    async with session.lease() as sandbox:
        with about(arguments.path):
            data, whole = await beginning(sandbox, arguments.path, READ_LIMIT)
    kind = mimetypes.guess_type(arguments.path)[0]
    facts = {"path": arguments.path, "bytes": len(data), "whole": whole}
    if whole and kind in IMAGE_TYPES and len(data) * 4 / 3 <= IMAGE_LIMIT:
        block = dict(create_image_block(base64=base64.b64encode(data).decode(), mime_type=kind))
        return Rendered(blocks=[block], artifact={**facts, "mime_type": kind})
    try:
        # The beginning of a long file may end within a character.
        text = data.decode(errors="strict" if whole else "ignore")
    except UnicodeDecodeError:
        return Rendered.of(f"{arguments.path} is not text: {len(data)} bytes. Look at it with `run_code`.", **facts)
    return Rendered.of(_lines(text, arguments, whole), **facts)


def _lines(text: str, arguments: ReadFile, whole: bool) -> str:
    lines = text.splitlines()
    start = arguments.first_line - 1
    chosen = lines[start : start + arguments.lines]
    shown, room = 0, TEXT_LIMIT
    for line in chosen:
        room -= len(line) + 1
        if room < 0:
            break
        shown += 1
    if chosen and not shown:
        cut = f"\n[The rest of this line of {len(chosen[0])} characters is left out.]"
        return chosen[0][:TEXT_LIMIT] + cut
    said = "\n".join(chosen[:shown])
    if not lines:
        return "[The file is empty.]"
    if not chosen:
        return f"[The file has only {len(lines)} lines.]"
    end = start + shown
    if end < len(lines) or not whole:
        of = f"of {len(lines)}" if whole else f"of more than {len(lines)}"
        said += f"\n[Lines {start + 1} to {end} {of}. Go on with `first_line` {end + 1}.]"
    return said


async def _write(session: Session, arguments: WriteFile, emit: Emit) -> Rendered:
    async with session.lease() as sandbox:
        with about(arguments.path):
            written = await sandbox.files.write(arguments.path, arguments.content)
    size = len(arguments.content.encode())
    return Rendered.of(f"Wrote {size} bytes to {written.path}.", path=written.path, bytes=size)


async def _list(session: Session, arguments: ListFiles, emit: Emit) -> Rendered:
    async with session.lease() as sandbox:
        with about(arguments.path):
            entries = await sandbox.files.list(arguments.path, depth=arguments.depth)
    lines = []
    for entry in entries[:ENTRIES]:
        what = "directory" if entry.type == "directory" else f"{entry.size} bytes"
        link = f" -> {entry.symlink_target}" if entry.symlink_target else ""
        lines.append(f"{entry.path}{link}  {what}")
    if len(entries) > ENTRIES:
        lines.append(f"[{len(entries) - ENTRIES} more are left out. List a directory below.]")
    return Rendered.of("\n".join(lines) or "[The directory is empty.]", count=len(entries))


async def beginning(sandbox: Sandbox, path: str, limit: int, *, user: str | None = None) -> tuple[bytes, bool]:
    """At most `limit` bytes of a file, and whether that is all."""
    data = bytearray()
    async with aclosing(sandbox.files.stream(path, user=user)) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) > limit:
                return bytes(data[:limit]), False
    return bytes(data), True


@contextlib.contextmanager
def about(path: str) -> Iterator[None]:
    """Turns what a sandbox says of a path into words that the model can act on."""
    try:
        yield
    except SandboxExpiredError:
        raise
    except NotFoundError as error:
        msg = f"There is no {path!r} in the sandbox. Look with `list_files`."
        raise RetryableByModel(msg) from error
    except APIError as error:
        if error.status_code != 400:
            raise
        msg = f"{path!r} can't be used like this: it may be a directory in place of a file. Look with `list_files`."
        raise RetryableByModel(msg) from error


READ_FILE = Tool(
    name="read_file",
    title="Read file",
    description=(
        "Read a text file of your sandbox, or see an image in it. Long files come in parts: go on where the last one "
        "ended. To compute with a file, load it in `run_code` instead, where it costs no reading."
    ),
    arguments=ReadFile,
    call=_read,
    hints=Hints(read_only=True, idempotent=True),
)

WRITE_FILE = Tool(
    name="write_file",
    title="Write file",
    description="Write a text file in your sandbox. What was there before is replaced as a whole.",
    arguments=WriteFile,
    call=_write,
    hints=Hints(destructive=True, idempotent=True),
)

LIST_FILES = Tool(
    name="list_files",
    title="List files",
    description="List what is in a directory of your sandbox, with sizes.",
    arguments=ListFiles,
    call=_list,
    hints=Hints(read_only=True, idempotent=True),
)
