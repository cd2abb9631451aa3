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
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox_tools.errors import EngineError

PIECE = 1 << 20
"""Bytes of the plain file in each piece; the last one has the rest."""

TAG = 16
"""Bytes that each piece is longer by when it is sealed."""

# More only wait for memory: one does 2 GB/s, reading and writing included.
_THREADS = min(4, os.cpu_count() or 1)

_SYNC_EACH = 0.01  # seconds

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
    sizes = {path.name: path.stat().st_size for path in sorted(source.iterdir())}
    cipher = AESGCM(key)

    def piece(room: memoryview, nonce: bytes, about: bytes, into: memoryview) -> None:
        cipher.encrypt_into(nonce, room, about, into)

    _each_piece(sizes, context, source, target, stop, piece, taken=0, given=TAG)
    return sizes


def unseal(key: bytes, context: str, sizes: Mapping[str, int], source: Path, target: Path) -> None:
    """The plain files again.

    Raises:
        OSError: There is no room for them.
        EngineError: They are not what was sealed: damaged, cut, or another snapshot's.
    """
    cipher = AESGCM(key)

    def piece(room: memoryview, nonce: bytes, about: bytes, into: memoryview) -> None:
        cipher.decrypt_into(nonce, room, about, into)

    try:
        _each_piece(sizes, context, source, target, threading.Event(), piece, taken=TAG, given=0)
    except InvalidTag:
        msg = f"The snapshot {context!r} is damaged: its bytes are not those that were written. It cannot be resumed."
        raise EngineError(msg, op="restore") from None


Turn = Callable[[memoryview, bytes, bytes, memoryview], None]
"""Seals or opens a piece: what was read, its nonce, what it is a piece of, and where the outcome goes."""


def _each_piece(
    sizes: Mapping[str, int],
    context: str,
    source: Path,
    target: Path,
    stop: threading.Event,
    turn: Turn,
    *,
    taken: int,
    given: int,
) -> None:
    """Turn every piece of every file; what is read is longer by `taken` than when plain, what is written by `given`."""
    for number, name in enumerate(sorted(sizes)):
        reading = os.open(source / name, os.O_RDONLY)
        try:
            writing = os.open(target / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                about = f"{context}\0{name}\0{sizes[name]}".encode()
                _each_of_file(sizes[name], number, about, reading, writing, stop, turn, taken=taken, given=given)
            finally:
                os.close(writing)
        finally:
            os.close(reading)


def _each_of_file(
    size: int,
    number: int,
    about: bytes,
    reading: int,
    writing: int,
    stop: threading.Event,
    turn: Turn,
    *,
    taken: int,
    given: int,
) -> None:
    pieces = -(-size // PIECE)

    def work(first: int) -> None:
        room, into = memoryview(bytearray(PIECE + taken)), memoryview(bytearray(PIECE + given))
        # Side by side, so that the file grows from its beginning on, as disks like it.
        for at in range(first, pieces, _THREADS):
            if stop.is_set():
                raise GivenUpError
            plain = min(PIECE, size - at * PIECE)
            _read(reading, room[: plain + taken], at * (PIECE + taken))
            turn(room[: plain + taken], _NONCE.pack(number, at), about, into[: plain + given])
            _write(writing, into[: plain + given], at * (PIECE + given))

    with _syncing(writing), ThreadPoolExecutor(_THREADS) as threads:
        for done in [threads.submit(work, first) for first in range(min(_THREADS, pieces))]:
            done.result()


@contextlib.contextmanager
def _syncing(fd: int) -> Iterator[None]:
    """Have the disk at work while there is more to come: a third less until all is on it. Who needs it there syncs."""
    done = threading.Event()
    errors: list[OSError] = []

    def sync() -> None:
        while not errors and not done.wait(_SYNC_EACH):
            try:
                os.fdatasync(fd)
            except OSError as error:
                errors.append(error)

    syncing = threading.Thread(target=sync, name="syncing")
    syncing.start()
    try:
        yield
    finally:
        done.set()
        syncing.join()
    # The kernel tells of a failed write once: whoever syncs afterwards would take it for good.
    if errors:
        raise errors[0]


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
