"""Files of a sandbox: read and written over HTTP as they come, looked at and moved by calls of envd."""

from __future__ import annotations

import builtins
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sandbox_tools.client import rpc
from sandbox_tools.client.exchange import MAX_ANSWER, exchange, whole
from sandbox_tools.client.wire import parsed, positive, was_there
from sandbox_tools.errors import ConflictError
from sandbox_tools.models import ENVD_PORT, EntryInfo, WrittenFile

if TYPE_CHECKING:
    from sandbox_tools.client.sandbox import Sandbox

PIECE = 256 * 1024
"""Bytes that are sent at a time."""


class Files:
    """What `Sandbox.files` is. A path that is not absolute is one in the user's home.

    All of it raises `NotFoundError` where there is no such file, though the sandbox is there; `SandboxExpiredError`
    where the sandbox is gone; `SandboxStateError` where it is paused; `APIError` where envd says no for another reason.

    Args of all methods:
        user: Who does it, and owns what is made. None: the sandbox's default user.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def read(self, path: str, *, user: str | None = None) -> bytes:
        """All of a file; for one that is larger than memory there is `stream`."""
        return await whole("files.read", self.stream(path, user=user), math.inf)

    async def stream(self, path: str, *, user: str | None = None) -> AsyncGenerator[bytes, None]:
        """A file's content as it arrives, which is never half of it: a broken connection raises.

        Raises:
            TransportError: The connection broke, or nothing came for `rpc.SILENCE` seconds.
        """
        answer = self._exchange("files.read", "GET", path, user, idempotent=True)
        async with aclosing(answer):
            async for chunk in answer:
                yield chunk

    async def write(
        self, path: str, data: bytes | str | AsyncIterable[bytes], *, user: str | None = None
    ) -> WrittenFile:
        """Writes a file and the directories above it; what was there is replaced, whole or not at all.

        It is sent once. If it is cancelled or its source raises, the old file stays.

        Args:
            data: Text is written as UTF-8; what comes in pieces is sent as it comes, and not kept in memory.

        Raises:
            TransportError: The connection broke, so it may have been written.
        """
        headers = {"Content-Type": "application/octet-stream"}
        if isinstance(data, str):
            data = data.encode()

        if isinstance(data, bytes):
            headers["Content-Length"] = str(len(data))
            data = _pieces(data)

        async with aclosing(_source(data)) as content:
            answer = self._exchange("files.write", "POST", path, user, headers=headers, content=content)
            try:
                reply = await whole("files.write", answer, MAX_ANSWER)
            except _SourceError as failed:
                # Whatever it is, it is the caller's: one of httpx's own must not pass for a failure of this request.
                raise failed.error from None

        return parsed(tuple[WrittenFile], reply, "files.write", self._sandbox.id)[0]

    async def list(self, path: str, *, depth: int = 1, user: str | None = None) -> builtins.list[EntryInfo]:
        """What is in a directory, by name, each directory followed by what is in it; links are not gone through.

        Args:
            depth: Levels to go down; 1 is the directory itself.
        """
        positive("files.list", "depth", depth, self._sandbox.id)
        answer = await self._ask("ListDir", "files.list", user, path=path, depth=depth)
        return parsed(list[EntryInfo], answer.get("entries", []), "files.list", self._sandbox.id)

    async def info(self, path: str, *, user: str | None = None) -> EntryInfo:
        """Looks at a file, directory or link."""
        answer = await self._ask("Stat", "files.info", user, path=path)
        return parsed(EntryInfo, answer.get("entry"), "files.info", self._sandbox.id)

    async def exists(self, path: str, *, user: str | None = None) -> bool:
        """Whether something is there, be it a link that leads nowhere."""
        return await was_there(self.info(path, user=user))

    async def make_dir(self, path: str, *, user: str | None = None) -> bool:
        """Makes a directory and those above it.

        Returns:
            True: made. False: there was one.
        """
        try:
            await self._ask("MakeDir", "files.make_dir", user, path=path)
        except ConflictError as error:
            if error.error_code != "already_exists":
                raise

            return False

        return True

    async def move(self, source: str, destination: str, *, user: str | None = None) -> EntryInfo:
        """Moves or renames, and makes the directories above the destination; a file that is there is replaced."""
        answer = await self._ask("Move", "files.move", user, source=source, destination=destination)
        return parsed(EntryInfo, answer.get("entry"), "files.move", self._sandbox.id)

    async def remove(self, path: str, *, user: str | None = None) -> None:
        """Removes a file, or a directory with all that is in it; nothing being there is no error."""
        await self._ask("Remove", "files.remove", user, path=path)

    def _exchange(
        self, op: str, method: str, path: str, user: str | None, **content: Any
    ) -> AsyncGenerator[bytes, None]:
        params = {"path": path} if user is None else {"path": path, "username": user}
        return exchange(self._sandbox, op, method, ENVD_PORT, "/files", params=params, timeout=rpc.SILENCE, **content)

    async def _ask(self, method: str, op: str, user: str | None, **message: Any) -> dict[str, Any]:
        return await rpc.unary(self._sandbox, f"filesystem.Filesystem/{method}", message, user=user, op=op)


class _SourceError(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


async def _source(data: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    # A generator can be sent only once: no other attempt could go on in the middle of it.
    try:
        async for piece in data:
            yield piece
    except Exception as error:
        raise _SourceError(error) from error


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
