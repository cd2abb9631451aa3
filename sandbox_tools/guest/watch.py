"""A directory that is watched: what happens in it, in order, from inotify to whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from inotify_simple import INotify, flags, parse_events

from sandbox_tools.guest.uploads import REPLACING, UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from inotify_simple import Event

QUEUED = 10_000
"""Events that wait at most; past them all are dropped, and whoever asks next is told so."""

CREATE, WRITE, REMOVE, RENAME, CHMOD = (
    f"EVENT_TYPE_{name}" for name in ("CREATE", "WRITE", "REMOVE", "RENAME", "CHMOD")
)

_KINDS = (
    (flags.CREATE | flags.MOVED_TO, CREATE),
    (flags.MODIFY, WRITE),
    (flags.DELETE | flags.DELETE_SELF, REMOVE),
    (flags.MOVED_FROM | flags.MOVE_SELF, RENAME),
    (flags.ATTRIB, CHMOD),
)
"""As in fsnotify, which envd uses: a name that is moved away is renamed, the one that it gets is created."""

_MASK = sum(mask for mask, _ in _KINDS) | flags.ONLYDIR

_READ_SIZE = 1 << 16


# The library looks for libc at its first use, with a process of its own: at a guest's start, and not in a call.
INotify().close()


class EventsLostError(Exception):
    """Raised when more happened than was kept."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that happened."""

    name: str
    """Relative to the watched directory; `.` for that itself."""
    kind: str


class Watch:
    """What happens in a directory, and with `recursive` in those below, also in new ones; made by `open`.

    The kernel keeps the watch and what it has seen over a pause, as it keeps files (tried with gVisor), so that nothing
    has to be done after one.
    """

    def __init__(self, path: Path, inotify: INotify, *, recursive: bool) -> None:
        self.path = path
        self._inotify = inotify
        self._recursive = recursive
        self._directories: dict[int, str] = {}
        """The directories under watch by the number that inotify gave them, relative to `path`."""
        self._announced: set[str] = set()
        """What new directories held when their watch began; inotify may report it as well."""
        self._moving: dict[int, tuple[str, bool]] = {}
        """What has been moved away and has not turned up yet, by inotify's cookie; whether it is a directory."""
        self._queue: deque[Change] = deque()
        self._more = asyncio.Event()
        self._lost = False
        self._ended = False

    @classmethod
    async def open(cls, path: Path, *, recursive: bool) -> Self:
        """Begins to watch.

        Raises:
            OSError: The directory cannot be watched; ENOTDIR where it is none.
        """
        watch = cls(path, INotify(nonblocking=True), recursive=recursive)
        try:
            # A large tree takes a while, and nobody else knows of the watch yet.
            await asyncio.to_thread(watch._begin)
        except BaseException:
            watch._inotify.close()
            raise

        asyncio.get_running_loop().add_reader(watch._inotify.fileno(), watch._read)
        return watch

    def close(self) -> None:
        """Stops; safe to call twice."""
        if not self._inotify.closed:
            asyncio.get_running_loop().remove_reader(self._inotify.fileno())
            self._inotify.close()
        self._ended = True
        self._more.set()

    def take(self) -> list[Change]:
        """What has happened since the last call.

        Raises:
            EventsLostError: It was more than is kept. The next call begins anew.
        """
        if not self._inotify.closed:
            self._read()
        taken = list(self._queue)
        self._queue.clear()
        self._more.clear()
        if self._lost:
            self._lost = False
            raise EventsLostError
        return taken

    async def wait(self) -> bool:
        """Waits until there is something to take. False: the directory is gone, and there will be nothing more."""
        while not (self._queue or self._lost or self._ended):
            self._more.clear()
            await self._more.wait()
        return bool(self._queue or self._lost)

    def _begin(self) -> None:
        root = self._inotify.add_watch(self.path, _MASK)
        self._directories[root] = "."
        if self._recursive:
            for _ in self._descend("."):
                pass

    def _descend(self, top: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Watches the directories below a watched one; yields all that is in there, by its name relative to the root.

        A directory is watched before it is read: what comes into it in between is seen twice, but never missed.
        """
        waiting = [top]
        while waiting:
            directory = waiting.pop()
            for name, found in self._entries(directory):
                if _is_directory(found) and self._add(name):
                    waiting.append(name)
                yield name, found

    def _entries(self, directory: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        with contextlib.suppress(OSError), os.scandir(self.path / directory) as entries:  # gone, or not to be read
            for each in entries:
                yield os.path.normpath(f"{directory}/{each.name}"), each

    def _add(self, name: str) -> bool:
        """Watches a directory below the root. False: it is gone again, or not to be watched."""
        try:
            number: int = self._inotify.add_watch(self.path / name, _MASK | flags.DONT_FOLLOW)
        except OSError:
            return False
        self._directories[number] = name
        return True

    def _read(self) -> None:
        try:
            while not self._inotify.closed:
                for event in parse_events(os.read(self._inotify.fileno(), _READ_SIZE)):
                    self._on_event(event)
        except BlockingIOError:
            # The queue is empty: what was seen twice has been, and what was moved away has not come back.
            self._announced.clear()
            for name, is_directory in self._moving.values():
                if is_directory:
                    self._forget(name)
            self._moving.clear()

    def _on_event(self, event: Event) -> None:
        if event.mask & flags.Q_OVERFLOW:
            self._overflow()
            return
        if event.mask & flags.IGNORED:
            if self._directories.pop(event.wd, None) == ".":
                self.close()
            return

        directory = self._directories.get(event.wd)
        if directory is None or (not event.name and directory != "."):
            return  # no longer watched, or reported by its parent as well

        name = os.path.normpath(f"{directory}/{event.name}")
        came = event.mask & (flags.CREATE | flags.MOVED_TO)
        announced = name in self._announced
        if event.mask & (flags.CREATE | flags.MOVED_TO | flags.DELETE | flags.MOVED_FROM):
            self._announced.discard(name)
        if announced and event.mask & flags.CREATE:
            return

        origin = self._moving.pop(event.cookie, None) if event.mask & flags.MOVED_TO else None
        if event.mask & flags.MOVED_FROM:
            self._moving[event.cookie] = (name, bool(event.mask & flags.ISDIR))
        if event.name.startswith(UNFINISHED):
            return

        # An upload over another file is seen as if it had been written in its place.
        if origin is None or not os.path.basename(origin[0]).startswith(REPLACING):
            self._put(name, next((kind for mask, kind in _KINDS if event.mask & mask), None))
        if came and event.mask & flags.ISDIR and self._recursive:
            self._enter(name, moved_from=origin[0] if origin else None)

    def _enter(self, name: str, *, moved_from: str | None) -> None:
        """Watches a directory that has come into the tree, and announces what it brings or has got since."""
        if moved_from is not None:
            self._rename(moved_from, name)
            return

        if not self._add(name):
            return
        for below, found in self._descend(name):
            self._announced.add(below)
            self._put(below, CREATE)
            if _has_content(found):  # nobody has seen it being written, but it has been
                self._put(below, WRITE)

    def _rename(self, old: str, new: str) -> None:
        for number, name in self._directories.items():
            if name == old or name.startswith(f"{old}/"):
                self._directories[number] = new + name[len(old) :]

    def _forget(self, name: str) -> None:
        for number, each in list(self._directories.items()):
            if each == name or each.startswith(f"{name}/"):
                del self._directories[number]
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(number)

    def _put(self, name: str, kind: str | None) -> None:
        if kind is None or os.path.basename(name).startswith(UNFINISHED):
            return

        change = Change(name, kind)
        if self._queue and self._queue[-1] == change:
            return  # the same again before anybody has looked is the same
        if self._lost:
            return
        if len(self._queue) >= QUEUED:
            self._overflow()
            return

        self._queue.append(change)
        self._more.set()

    def _overflow(self) -> None:
        self._queue.clear()
        self._lost = True
        self._more.set()


def _is_directory(found: os.DirEntry[str]) -> bool:
    try:
        return found.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _has_content(found: os.DirEntry[str]) -> bool:
    try:
        return found.is_file(follow_symlinks=False) and found.stat(follow_symlinks=False).st_size > 0
    except OSError:
        return False
