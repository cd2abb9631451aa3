"""The frames that both ends of the tunnel speak over a pair of pipes.

The pipes are a container's standard input and output. They outlive either end: the engine may die and another take
over, and the guest may be checkpointed in the middle of a frame and wake up with new pipes. So every attachment
begins with `HELLO` and a fresh nonce, after which both ends hold no stream and stand at a frame's first byte:

* towards the guest, the host first writes more zero bytes than a frame can hold. They complete whatever frame was
  cut, and what is left of them are `NOP` frames, one zero byte each.
* towards the host, the guest answers with the same `HELLO`, and the host drops everything before it. The nonce is
  random, so nothing else can look like it.

A frame is one byte of type, four of stream number, four of length, then the payload.
"""

from __future__ import annotations

import fcntl
import re
import struct

NOP, HELLO, OPEN, OPENED, DATA, CREDIT, EOF, RESET = range(8)

HEADER = struct.Struct("!BII")
NUMBER = struct.Struct("!I")
MAX_PAYLOAD = 1 << 18
NONCE_BYTES = 16
RESYNC = bytes(HEADER.size + MAX_PAYLOAD)

PIPE_SIZE = 1 << 20
"""Bytes a pipe should hold, if its owner may: larger saves wake-ups."""

# What is read in one go: each end holds room for it, for each sandbox.
_READ_SIZE = 1 << 19

_NOT_NOP = re.compile(rb"[^\0]")


class BrokenFrameError(ConnectionError):
    """Raised when bytes arrive that no peer of ours would send; the tunnel cannot be trusted after it."""


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame as bytes."""
    return HEADER.pack(kind, stream, len(payload)) + payload


class FrameReader:
    """Bytes in any pieces -> whole frames; does no I/O."""

    def __init__(self) -> None:
        self._buffer = bytearray(_READ_SIZE + HEADER.size + MAX_PAYLOAD)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def room(self) -> memoryview:
        """Where the next bytes are to be written; `took` says how many were."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < _READ_SIZE:
            left = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, len(left)
            self._view[: self._end] = left
        return self._view[self._end :]

    def took(self, count: int) -> None:
        """So many bytes are in the room that was given."""
        self._end += count

    def frames(self, limit: int) -> list[tuple[int, int, bytes]]:
        """Up to `limit` whole frames, as (type, stream, payload); fewer only where there are no more of them.

        Raises:
            BrokenFrameError: An unknown type, or a payload longer than a frame may hold.
        """
        frames: list[tuple[int, int, bytes]] = []
        while len(frames) < limit and self._start < self._end:
            if self._buffer[self._start] == NOP:
                # A run of thousands of these is what a resync looks like: step over it in one go.
                found = _NOT_NOP.search(self._buffer, self._start, self._end)
                self._start = found.start() if found else self._end
                continue

            if self._end - self._start < HEADER.size:
                break

            kind, stream, length = HEADER.unpack_from(self._buffer, self._start)
            if kind > RESET or length > MAX_PAYLOAD:
                msg = f"A frame of type {kind} with {length} bytes is not one of ours."
                raise BrokenFrameError(msg)

            begin = self._start + HEADER.size
            if self._end < begin + length:
                break

            self._start = begin + length
            # A copy: what is kept must not keep the whole buffer.
            frames.append((kind, stream, bytes(self._view[begin : self._start])))
        return frames

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that `data` completes.

        Raises:
            BrokenFrameError: As `frames`.
        """
        found: list[tuple[int, int, bytes]] = []
        left = memoryview(data)
        while left:
            room = self.room()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            self.took(count)
            left = left[count:]
            found += self.frames(len(data))
        return found


def enlarge(fd: int) -> None:
    """Let a pipe hold as much as its owner may make it hold; an ordinary user may own 64 MiB of pipes (pipe(7))."""
    for size in (PIPE_SIZE, PIPE_SIZE >> 2):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        except OSError:
            continue
        return


def number_in(payload: bytes) -> int:
    """The number that the payload of `OPEN` or `CREDIT` is.

    Raises:
        BrokenFrameError: It is none.
    """
    if len(payload) != NUMBER.size:
        msg = f"A number of {len(payload)} bytes is not one of ours."
        raise BrokenFrameError(msg)
    number: int = NUMBER.unpack(payload)[0]
    return number
