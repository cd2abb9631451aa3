"""Files handed between the sandbox and the people around it, through a directory of the host that an operator names."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
import os
import secrets
import stat
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

from pydantic import Field

from sandbox_tools.session.session import Session
from sandbox_tools.tools.files import about
from sandbox_tools.tools.render import Rendered, RetryableByModel
from sandbox_tools.tools.tool import Arguments, Emit, Hints, Tool

LIMIT = 200_000_000
"""Bytes of one file that is handed out."""

PIECE = 256 * 1024


class Artifacts:
    """Whose files are where: each conversation has a directory of its own, which no name of another's leads to.

    Args:
        root: A directory of the host; made on first use, with those below it, for this user only.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def directory(self, owner: str, thread: str) -> Path:
        """Where the files of that conversation are: what its model may upload is put there, and what it hands out."""
        return self.root / _part(owner) / _part(thread)

    def tools(self) -> tuple[Tool, Tool]:
        """`upload_file` and `download_file`."""
        return (
            Tool(
                name="upload_file",
                title="Upload file",
                description=(
                    "Bring a file that the user has attached to this conversation into your sandbox. Call it with an "
                    "unknown name to hear which there are."
                ),
                arguments=Upload,
                call=self._upload,
                hints=Hints(idempotent=True),
            ),
            Tool(
                name="download_file",
                title="Download file",
                description=(
                    "Hand a file of your sandbox to the user, who gets it under its own name. Use it for results that "
                    "the user wants to keep, such as reports, tables and images."
                ),
                arguments=Download,
                call=self._download,
                hints=Hints(idempotent=True),
            ),
        )

    async def _upload(self, session: Session, arguments: Upload, emit: Emit) -> Rendered:
        directory = self.directory(session.owner, session.thread)
        opened = await asyncio.to_thread(_opened, directory, arguments.name)
        if opened is None:
            there = await asyncio.to_thread(_names, directory)
            msg = f"The user has attached no {arguments.name!r}. There is: {', '.join(there) or 'nothing'}."
            raise RetryableByModel(msg)
        try:
            size = os.fstat(opened).st_size
            path = arguments.path or arguments.name
            async with session.lease() as sandbox:
                with about(path):
                    written = await sandbox.files.write(path, _pieces(opened))
        finally:
            os.close(opened)
        return Rendered.of(f"Wrote {size} bytes to {written.path}.", path=written.path, bytes=size)

    async def _download(self, session: Session, arguments: Download, emit: Emit) -> Rendered:
        name = arguments.name or arguments.path.rstrip("/").rpartition("/")[2]
        if not _is_name(name):
            msg = f"{name!r} is no name for a file. Pass `name` without slashes."
            raise RetryableByModel(msg)
        directory = self.directory(session.owner, session.thread)
        await asyncio.to_thread(lambda: directory.mkdir(mode=0o700, parents=True, exist_ok=True))
        # Under another name until it is whole: whoever takes it never takes half of it.
        part = directory / f".{secrets.token_hex(8)}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with part.open("xb") as file:
                async with session.lease() as sandbox:
                    with about(arguments.path):
                        async with aclosing(sandbox.files.stream(arguments.path)) as pieces:
                            async for piece in pieces:
                                size += len(piece)
                                if size > LIMIT:
                                    msg = f"It has more than {LIMIT // 1_000_000} MB. Make it smaller."
                                    raise RetryableByModel(msg)
                                digest.update(piece)
                                await asyncio.to_thread(file.write, piece)
            await asyncio.to_thread(os.replace, part, directory / name)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()
        facts = {"name": name, "bytes": size, "sha256": digest.hexdigest(), "mime_type": mimetypes.guess_type(name)[0]}
        return Rendered.of(f"The user has {name} now ({size} bytes).", file=facts)


class Upload(Arguments):
    """Arguments of `upload_file`."""

    name: str = Field(description="The name of the attached file.")
    path: str | None = Field(default=None, description="Where to. Leave it out for its name in the home directory.")


class Download(Arguments):
    """Arguments of `download_file`."""

    path: str = Field(description="A file of the sandbox: absolute, or from the home directory.")
    name: str | None = Field(default=None, description="What the user sees. Leave it out for the file's own name.")


def _part(text: str) -> str:
    """As one component of a path: no two texts have the same, and none leads anywhere else."""
    quoted = urllib.parse.quote(text, safe="").replace(".", "%2E")
    return quoted if len(quoted) <= 200 else quoted[:130] + "-" + hashlib.sha256(text.encode()).hexdigest()


def _is_name(name: str) -> bool:
    return bool(name) and len(name.encode()) <= 255 and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def _opened(directory: Path, name: str) -> int | None:
    """A descriptor of a regular file in there; links, which may lead out, are none."""
    if not _is_name(name):
        return None
    try:
        opened = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return opened
    os.close(opened)
    return None


def _names(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(directory) if _is_name(entry.name) and entry.is_file())
    except FileNotFoundError:
        return []


async def _pieces(opened: int) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(os.read, opened, PIECE):
        yield piece
