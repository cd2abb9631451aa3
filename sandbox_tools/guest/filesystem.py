"""envd's `filesystem.Filesystem`: what is where, moved, made, removed and watched."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox_tools.guest.accounts import BadPathError, resolve
from sandbox_tools.guest.connect import Call, RpcError, server_stream, service, unary
from sandbox_tools.guest.entries import Names, entry, text
from sandbox_tools.guest.refusals import refusal, shown
from sandbox_tools.guest.uploads import UNFINISHED, make_parents
from sandbox_tools.guest.watch import Change, EventsLostError, Watch

if TYPE_CHECKING:
    from starlette.routing import Route

LISTED = 100_000
"""Entries that one call lists at most."""

WATCHERS = 256
"""Watchers that wait to be asked, at most; a caller that never removes its own must not fill the memory."""


def routes() -> list[Route]:
    """All methods of the service."""
    polled = Polled()
    return service(
        "filesystem.Filesystem",
        {
            "Stat": unary(_stat),
            "MakeDir": unary(_make_dir),
            "Move": unary(_move),
            "ListDir": unary(_list_dir),
            "Remove": unary(_remove),
            "WatchDir": server_stream(_watch_dir, keepalive={"keepalive": {}}),
            "CreateWatcher": unary(polled.create),
            "GetWatcherEvents": unary(polled.events),
            "RemoveWatcher": unary(polled.remove),
        },
    )


async def _stat(call: Call) -> dict[str, Any]:
    path = _path(call)
    with _refused(path):
        try:
            return {"entry": entry(path, Names())}
        except NotADirectoryError as error:  # below a file there is nothing, which is an answer to who asks for it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error


async def _make_dir(call: Call) -> dict[str, Any]:
    path = _path(call)
    with _refused(path):
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise RpcError("already_exists", f"directory {shown(path)} exists already")
            raise RpcError("invalid_argument", f"path {shown(path)} is there already, and is no directory")
        make_parents(path, call.account)
        return {"entry": entry(path, Names())}


async def _move(call: Call) -> dict[str, Any]:
    source, destination = _path(call, "source"), _path(call, "destination")
    with _refused(source):
        os.lstat(source)
    with _refused(destination):
        make_parents(destination.parent, call.account)
        try:
            os.rename(source, destination)
        except OSError as error:
            if error.errno == errno.EXDEV:
                await _move_across(source, destination)
            elif error.errno == errno.ENOTDIR:
                message = f"path {shown(destination)} is a file, which directory {shown(source)} cannot replace"
                raise RpcError("invalid_argument", message) from None
            elif error.errno == errno.EINVAL:
                message = f"directory {shown(source)} cannot be moved into itself, to {shown(destination)}"
                raise RpcError("invalid_argument", message) from None
            else:
                why = refusal(error, destination)
                raise RpcError(why.code, f"path {shown(source)} cannot be moved: {why.message}") from error
        return {"entry": entry(destination, Names())}


async def _move_across(source: Path, destination: Path) -> None:
    """To another file system: copied with all that belongs to it, and removed where it was once it is in its place."""
    partial = destination.parent / f"{UNFINISHED}{secrets.token_hex(8)}"
    try:
        await _run("cp", "--archive", "--no-target-directory", "--", str(source), str(partial))
        os.rename(partial, destination)
    except BaseException:
        # What has been copied so far is nobody's; the source is as it was.
        await asyncio.shield(_run("rm", "--recursive", "--force", "--", str(partial)))
        raise
    await asyncio.shield(_run("rm", "--recursive", "--force", "--", str(source)))


async def _list_dir(call: Call) -> dict[str, Any]:
    path = _path(call)
    depth = _number(call, "depth") or 1
    with _refused(path):
        return {"entries": await asyncio.to_thread(_listed, path, depth)}


def _listed(path: Path, depth: int) -> list[dict[str, Any]]:
    """All entries below a directory, each followed by those below it, by name; links are not gone through."""
    names = Names()
    entries: list[dict[str, Any]] = []
    if not stat.S_ISDIR(os.stat(path).st_mode):
        raise RpcError("invalid_argument", f"path {shown(path)} is no directory")

    waiting = [(path / name, 1) for name in sorted(os.listdir(path), reverse=True)]
    while waiting:
        each, level = waiting.pop()
        # Gone since, or not to be read: what is told of the rest is right nevertheless.
        with suppress(FileNotFoundError, NotADirectoryError, ProcessLookupError, PermissionError):
            entries.append(entry(each, names))
            if len(entries) > LISTED:
                message = f"path {shown(path)} has more than {LISTED} entries at depth {depth}. List less of it."
                raise RpcError("failed_precondition", message)
            if level < depth and stat.S_ISDIR(os.lstat(each).st_mode):
                waiting += [(each / name, level + 1) for name in sorted(os.listdir(each), reverse=True)]
    return entries


async def _remove(call: Call) -> dict[str, Any]:
    path = _path(call)
    with _refused(path), suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            await _run("rm", "--recursive", "--force", "--", str(path))
        else:
            os.unlink(path)
    return {}


async def _watch_dir(call: Call) -> AsyncIterator[dict[str, Any]]:
    watch = await _watch(call)
    try:
        yield {"start": {}}
        while await watch.wait():
            for change in _taken(watch):
                yield {"filesystem": _event(watch, change, with_entry=_flag(call, "includeEntry"))}
    finally:
        watch.close()


class Polled:
    """The watchers that callers ask for their events."""

    def __init__(self) -> None:
        self._watches: dict[str, tuple[Watch, bool]] = {}

    async def create(self, call: Call) -> dict[str, Any]:
        """Makes one; it lives until it is removed, also over pauses."""
        if len(self._watches) >= WATCHERS:
            raise RpcError("resource_exhausted", f"there are {WATCHERS} watchers already. Remove one first.")

        with_entry = _flag(call, "includeEntry")
        watch = await _watch(call)
        number = uuid.uuid4().hex
        self._watches[number] = (watch, with_entry)
        return {"watcherId": number}

    async def events(self, call: Call) -> dict[str, Any]:
        """What has happened since it was last asked."""
        watch, with_entry = self._watches[self._known(call)]
        return {"events": [_event(watch, change, with_entry=with_entry) for change in _taken(watch)]}

    async def remove(self, call: Call) -> dict[str, Any]:
        """Removes one."""
        watch, _ = self._watches.pop(self._known(call))
        watch.close()
        return {}

    def _known(self, call: Call) -> str:
        number = _string(call, "watcherId")
        if number not in self._watches:
            raise RpcError("not_found", f"there is no watcher {number!r}. Create one.")
        return number


async def _watch(call: Call) -> Watch:
    path = _path(call)
    recursive = _flag(call, "recursive")
    _flag(call, "includeEntry")
    with _refused(path):
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise RpcError("invalid_argument", f"path {shown(path)} is no directory")
        return await Watch.open(path, recursive=recursive)


def _taken(watch: Watch) -> list[Change]:
    try:
        return watch.take()
    except EventsLostError:
        message = f"so much happened in {shown(watch.path)} that some events were dropped. List it, and go on watching."
        raise RpcError("resource_exhausted", message) from None


def _event(watch: Watch, change: Change, *, with_entry: bool) -> dict[str, Any]:
    event: dict[str, Any] = {"name": text(change.name), "type": change.kind}
    if with_entry:
        with suppress(OSError):  # gone since
            event["entry"] = entry(watch.path / change.name, Names())
    return event


async def _run(*command: str) -> None:
    """Runs one of the system's own tools, which do a long job outside of the loop; an error says what they said."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise

    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or [f"{command[0]} failed"]
        raise RpcError("failed_precondition", f"{lines[0]}. Put that right and try again.")


def _path(call: Call, field: str = "path") -> Path:
    try:
        return resolve(_string(call, field), call.account)
    except BadPathError as error:
        raise RpcError("invalid_argument", str(error)) from None


def _string(call: Call, field: str) -> str:
    value = call.message.get(field, "")
    if not isinstance(value, str):
        raise RpcError("invalid_argument", f"`{field}` is not a string. Send one.")
    return value


def _flag(call: Call, field: str) -> bool:
    value = call.message.get(field, False)
    if not isinstance(value, bool):
        raise RpcError("invalid_argument", f"`{field}` is neither `true` nor `false`. Send one of them.")
    return value


def _number(call: Call, field: str) -> int:
    value = call.message.get(field, 0)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise RpcError("invalid_argument", f"`{field}` is not a number from 0 to {(1 << 32) - 1}. Send one.")
    return value


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns the system's errors about a path into answers."""
    try:
        yield
    except OSError as error:
        why = refusal(error, path)
        raise RpcError(why.code, why.message) from error
