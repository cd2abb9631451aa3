"""Files under authenticated encryption, in pieces, so that any number of threads can work on one.

Each piece is sealed with AES-256-GCM under the snapshot's own key, which seals nothing else. Its nonce is the number of
the file and of the piece; what it is a piece of (snapshot, file, length) goes into the authentication, so that pieces
can't be moved, repeated, left out or taken from elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
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


class GivenUpError(Exception):
    """Raised where the work was given up halfway, as it was asked for."""


def seal(key: bytes, context: str, source: Path, target: Path, stop: threading.Event) -> dict[str, int]:
    """Seal every file of a directory into another one; the length of each, plain, by name.

    Args:
        key: Of this snapshot alone.
        context: Names the snapshot.
        stop: Give up when it is set.

    Raises:
        OSError: The disk is full or failing.
        GivenUpError: As asked.
    """
    cipher = AESGCM(key)

    def turn(room: memoryview, nonce: bytes, about: bytes, into: memoryview) -> None:
        cipher.encrypt_into(nonce, room, about, into)

    work = _Work(turn, context=context, given=TAG, stop=stop)
    sizes = {path.name: path.stat().st_size for path in source.iterdir()}
    with _created(target, sizes) as writing, _synced(target):
        for number, name in enumerate(sorted(sizes)):
            with _opened(source / name) as reading:
                work.file(number, name, sizes[name], reading, writing[name])
    return sizes


def unseal(
    key: bytes,
    context: str,
    sizes: Mapping[str, int],
    source: Path,
    target: Path,
    *,
    piece: int = PIECE,
    near: Callable[[], None] = lambda: None,
) -> None:
    """The plain files again.

    Args:
        piece: As `PIECE` was when they were sealed.
        near: Called when it will not take long any more; from then on whoever opens a file waits until it is whole. Not
            where files can't be held so.

    Raises:
        OSError: There is no room for them.
        EngineError: They are not what was sealed: damaged, cut, or another snapshot's; or it took too long.
    """
    cipher = AESGCM(key)

    def turn(room: memoryview, nonce: bytes, about: bytes, into: memoryview) -> None:
        cipher.decrypt_into(nonce, room, about, into)

    work = _Work(turn, context=context, piece=piece, taken=TAG)
    try:
        with _created(target, sizes) as writing, holding(writing.values(), sum(sizes.values()), near) as held:
            for number, name in enumerate(sorted(sizes)):
                with _opened(source / name) as reading:
                    work.file(number, name, sizes[name], reading, writing[name], held.tell, held.check)
    except InvalidTag:
        msg = f"The snapshot {context!r} is damaged: its bytes are not those that were written. It cannot be resumed."
        raise EngineError(msg, op="restore") from None


Turn = Callable[[memoryview, bytes, bytes, memoryview], None]
"""Seals or opens a piece: what was read, its nonce, what it is a piece of, and where the outcome goes."""


@dataclass(frozen=True)
class _Work:
    """Turns every piece of a file; what is read is longer by `taken` than when plain, what is written by `given`."""

    turn: Turn
    context: str
    piece: int = PIECE
    taken: int = 0
    given: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def file(
        self,
        number: int,
        name: str,
        size: int,
        reading: int,
        writing: int,
        tell: Callable[[int], None] = lambda _size: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """The whole of one.

        Args:
            tell: Told of the plain bytes of each piece that is written.
            check: Called before the last one is, without which the file is shorter than it should be.
        """
        last = -(-size // self.piece) - 1
        about = f"{self.context}\0{name}\0{size}".encode()

        def work(first: int, end: int) -> None:
            room, into = memoryview(bytearray(self.piece + self.taken)), memoryview(bytearray(self.piece + self.given))
            # Side by side, so that the file grows from its beginning on, as disks like it.
            for at in range(first, end, _THREADS):
                if self.stop.is_set():
                    raise GivenUpError
                plain = min(self.piece, size - at * self.piece)
                _read(reading, room[: plain + self.taken], at * (self.piece + self.taken))
                nonce = _NONCE.pack(number, at)
                self.turn(room[: plain + self.taken], nonce, about, into[: plain + self.given])
                _write(writing, into[: plain + self.given], at * (self.piece + self.given))
                tell(plain)

        with ThreadPoolExecutor(_THREADS) as threads:
            for done in [threads.submit(work, first, last) for first in range(min(_THREADS, last))]:
                done.result()
        check()
        work(max(0, last), last + 1)


@contextlib.contextmanager
def _created(directory: Path, names: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """New files, open for writing."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with contextlib.ExitStack() as files:
        yield {name: files.enter_context(_opened(directory / name, flags)) for name in sorted(names)}


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _synced(directory: Path) -> Iterator[None]:
    done = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        syncing = thread.submit(snapshots.keep_syncing, directory, done)
        try:
            yield
        finally:
            done.set()
        syncing.result()


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
