"""Files under authenticated encryption, in pieces, so that any number of threads can work on one.

Each piece is sealed with AES-256-GCM under the snapshot's own key, which seals nothing else. Its nonce is the number of
the file and of the piece; what it is a piece of (snapshot, file) goes into the authentication, and into the last one's
the length, so that pieces can't be moved, repeated, left out or taken from elsewhere: the STREAM construction of Hoang,
Reyhanitabar, Rogaway and Vizar (2015), which needs no length before the end.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox_tools.engine.images import snapshots
from sandbox_tools.engine.images.held import holding
from sandbox_tools.errors import EngineError

PIECE = 512 << 10
"""Bytes of the plain file in each piece; the last one has the rest. It and its outcome fit into a core's cache."""

TAG = 16
"""Bytes that each piece is longer by when it is sealed."""

# More only wait for memory: one does 2 GB/s, reading and writing included.
_THREADS = min(4, os.cpu_count() or 1)

_NONCE = struct.Struct(">IQ")

_LOOK_EACH = 0.005  # seconds


class GivenUpError(Exception):
    """Raised where the work was given up halfway, as it was asked for."""


def seal(
    key: bytes, context: str, source: Path, target: Path, *, whole: threading.Event, stop: threading.Event
) -> dict[str, int]:
    """Seal every file of a directory into another one while they grow; the length of each, plain, in order.

    Args:
        key: Of this snapshot alone.
        context: Names the snapshot.
        whole: Set when they grow no more. Until then each does at its end, and nowhere else.
        stop: Give up when it is set.

    Raises:
        EngineError: One was cut.
        OSError: The disk is full or failing.
        GivenUpError: As asked.
    """
    cipher = AESGCM(key)

    def turn(room: memoryview, nonce: bytes, about: bytes, into: memoryview) -> memoryview:
        cipher.encrypt_into(nonce, room, about, into)
        return into

    return _follow(_Work(turn, context=context, given=TAG, stop=stop), source, target, whole)


def copy(source: Path, target: Path, *, whole: threading.Event, stop: threading.Event) -> None:
    """The same without sealing anything."""
    _follow(_Work(lambda room, _nonce, _about, _into: room, stop=stop), source, target, whole)


def unseal(
    key: bytes,
    context: str,
    sizes: Mapping[str, int],
    source: Path,
    target: Path,
    *,
    piece: int = PIECE,
    grown: bool = True,
    near: Callable[[], None] = lambda: None,
) -> None:
    """The plain files again.

    Args:
        sizes: What `seal` gave, in that order.
        piece: As `PIECE` was when they were sealed.
        grown: Whether it was `seal` that did it, and not an earlier one, which knew the lengths beforehand.
        near: Called when it will not take long any more; from then on whoever opens a file waits until it is whole. Not
            where files can't be held so.

    Raises:
        OSError: There is no room for them.
        EngineError: They are not what was sealed: damaged, cut, or another snapshot's; or it took too long.
    """
    cipher = AESGCM(key)

    def turn(room: memoryview, nonce: bytes, about: bytes, into: memoryview) -> memoryview:
        cipher.decrypt_into(nonce, room, about, into)
        return into

    work = _Work(turn, context=context, piece=piece, taken=TAG, grown=grown)
    names = list(sizes) if grown else sorted(sizes)
    try:
        with contextlib.ExitStack() as opened, ThreadPoolExecutor(_THREADS) as threads:
            writing = {name: opened.enter_context(_new(target / name)) for name in names}
            held = opened.enter_context(holding(writing.values(), sum(sizes.values()), near))
            opened.enter_context(_read_ahead(source / name for name in names))
            for number, name in enumerate(names):
                with _opened(source / name) as reading:
                    file = _File(number, name, reading, writing[name], sizes[name])
                    work.all_but_last(file, threads, held.tell)
                    # Without its last piece it is shorter than it should be.
                    held.check()
                    work.last(file)
    except InvalidTag:
        msg = f"The snapshot {context!r} is damaged: its bytes are not those that were written. It cannot be resumed."
        raise EngineError(msg, op="restore") from None


def _follow(work: _Work, source: Path, target: Path, whole: threading.Event) -> dict[str, int]:
    files: dict[str, _File] = {}
    with contextlib.ExitStack() as opened, _kept_at_work(target), ThreadPoolExecutor(_THREADS) as threads:
        ended = False
        while not ended:
            ended = whole.wait(_LOOK_EACH)
            if work.stop.is_set():
                raise GivenUpError
            for path in sorted(filter(Path.is_file, source.iterdir())):
                if path.name not in files:
                    reading, writing = _opened(path), _new(target / path.name)
                    fds = opened.enter_context(reading), opened.enter_context(writing)
                    files[path.name] = _File(len(files), path.name, *fds)
                file, before = files[path.name], files[path.name].size
                file.size = os.fstat(file.reading).st_size
                if file.size < before:
                    # To seal a piece a second time under the same nonce would give it away.
                    msg = f"The image's {path.name!r} was cut while it was written."
                    raise EngineError(msg, op="checkpoint")
                work.all_but_last(file, threads)
                if ended:
                    work.last(file)
    return {file.name: file.size for file in files.values()}


Turn = Callable[[memoryview, bytes, bytes, memoryview], memoryview]
"""What is done to a piece: of what was read, its nonce, what it is a piece of, and room, it makes what is written."""


@dataclass
class _File:
    """One that is turned into another.

    Attributes:
        size: In bytes, when it is plain; as far as it has grown.
        turned: Pieces, from its beginning.
    """

    number: int
    name: str
    reading: int
    writing: int
    size: int = 0
    turned: int = 0


@dataclass(frozen=True)
class _Work:
    """Turns every piece of a file; what is read is longer by `taken` than when plain, what is written by `given`."""

    turn: Turn
    context: str = ""
    piece: int = PIECE
    taken: int = 0
    given: int = 0
    grown: bool = True
    stop: threading.Event = field(default_factory=threading.Event)

    def all_but_last(
        self, file: _File, threads: ThreadPoolExecutor, tell: Callable[[int], None] = lambda _size: None
    ) -> None:
        """Every piece that has not been turned yet, except for the last that there is by now.

        Args:
            tell: Told of the plain bytes of each that is written.
        """
        ahead = range(file.turned, self._last(file))
        # Side by side, so that the file grows from its beginning on, as disks like it.
        shares = [ahead[first::_THREADS] for first in range(min(_THREADS, len(ahead)))]
        for done in [threads.submit(self._pieces, file, share, tell) for share in shares]:
            done.result()
        file.turned += len(ahead)

    def last(self, file: _File) -> None:
        """The one that is left then; even a file of nothing has one."""
        if file.size or self.grown:
            self._pieces(file, [self._last(file)], lambda _size: None)

    def _last(self, file: _File) -> int:
        return max(0, -(-file.size // self.piece) - 1)

    def _pieces(self, file: _File, numbers: Iterable[int], tell: Callable[[int], None]) -> None:
        room, into = memoryview(bytearray(self.piece + self.taken)), memoryview(bytearray(self.piece + self.given))
        for at in numbers:
            if self.stop.is_set():
                raise GivenUpError
            plain = min(self.piece, file.size - at * self.piece)
            length = file.size if at == self._last(file) or not self.grown else ""
            _read(file.reading, room[: plain + self.taken], at * (self.piece + self.taken))
            about = f"{self.context}\0{file.name}\0{length}".encode()
            nonce = _NONCE.pack(file.number, at)
            turned = self.turn(room[: plain + self.taken], nonce, about, into[: plain + self.given])
            _write(file.writing, turned, at * (self.piece + self.given))
            tell(plain)


def _new(path: Path) -> contextlib.AbstractContextManager[int]:
    return _opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _read_ahead(paths: Iterable[Path]) -> Iterator[None]:
    """Have the disk at work on what is not in the page cache; by itself the kernel looks ahead by 128 kB."""
    done = threading.Event()

    def read_ahead() -> None:
        byte = bytearray(1)
        # What can't be read is told to who needs it.
        with contextlib.suppress(OSError):
            for path in paths:
                with _opened(path) as fd:
                    for at in range(0, os.fstat(fd).st_size, PIECE):
                        if done.is_set():
                            return
                        try:
                            os.preadv(fd, [byte], at, os.RWF_NOWAIT)
                        except BlockingIOError:
                            os.posix_fadvise(fd, at, PIECE, os.POSIX_FADV_WILLNEED)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(read_ahead)
        try:
            yield
        finally:
            done.set()


@contextlib.contextmanager
def _kept_at_work(directory: Path) -> Iterator[None]:
    done = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(snapshots.keep_at_work, directory, done)
        try:
            yield
        finally:
            done.set()
        working.result()


def _read(fd: int, room: memoryview, at: int) -> None:
    while room:
        count = os.preadv(fd, [room], at)
        if not count:
            raise InvalidTag  # it is shorter than it was
        room, at = room[count:], at + count


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(fd, data, at)
        data, at = data[count:], at + count
