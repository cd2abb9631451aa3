"""Many streams over one pair of pipes: the frames that both ends of the tunnel speak.

The pipes are a container's standard input and output. They outlive either end: the engine may die and another take
over, and the guest may be checkpointed in the middle of a frame and wake up with new pipes. So every attachment
begins with `HELLO` and a fresh nonce, after which both ends hold no stream and stand at a frame's first byte:

* towards the guest, the host first writes more zero bytes than a frame can hold. They complete whatever frame was
  cut, and what is left of them are `NOP` frames, one zero byte each.
* towards the host, the guest answers with the same `HELLO`, and the host drops everything before it. The nonce is
  random, so nothing else can look like it.

A frame is one byte of type, four of stream number, four of length, then the payload. Only the host opens streams.
Each direction of a stream has a window: a sender spends credit and the receiver grants it back as its reader reads,
so a slow reader stops its own sender and nobody else.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NOP, HELLO, OPEN, OPENED, DATA, CREDIT, EOF, RESET = range(8)

HEADER = struct.Struct("!BII")
NUMBER = struct.Struct("!I")
MAX_PAYLOAD = 1 << 16
WINDOW = 1 << 18
NONCE_BYTES = 16
RESYNC = bytes(HEADER.size + MAX_PAYLOAD)

# Beyond this many queued bytes a writer waits for the pipe.
_HIGH_WATER = 1 << 18
_READ_SIZE = 1 << 18


class StreamResetError(ConnectionError):
    """Raised when the other end gave the stream up, or the tunnel itself is gone."""


class BrokenFrameError(ConnectionError):
    """Raised when bytes arrive that no peer of ours would send; the tunnel cannot be trusted after it."""


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame as bytes."""
    return HEADER.pack(kind, stream, len(payload)) + payload


class FrameReader:
    """Bytes in any pieces -> whole frames; does no I/O."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that `data` completes, as (type, stream, payload).

        Raises:
            BrokenFrameError: An unknown type, or a payload longer than a frame may hold.
        """
        self._buffer += data
        frames: list[tuple[int, int, bytes]] = []
        at = 0
        while at < len(self._buffer):
            if self._buffer[at] == NOP:
                # A run of thousands of these is what a resync looks like: step over it in one go.
                rest = self._buffer[at:].lstrip(b"\0")
                at = len(self._buffer) - len(rest)
                continue

            if len(self._buffer) - at < HEADER.size:
                break

            kind, stream, length = HEADER.unpack_from(self._buffer, at)
            if kind > RESET or length > MAX_PAYLOAD:
                msg = f"A frame of type {kind} with {length} bytes is not one of ours."
                raise BrokenFrameError(msg)

            if len(self._buffer) - at < HEADER.size + length:
                break

            start = at + HEADER.size
            frames.append((kind, stream, bytes(self._buffer[start : start + length])))
            at = start + length

        del self._buffer[:at]
        return frames


class Stream:
    """One byte stream through the tunnel, to or from a TCP port of the guest."""

    def __init__(self, mux: Mux, number: int, port: int) -> None:
        self.number = number
        self.port = port
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The opener may be gone before the answer comes; nobody then needs to hear of it.
        self.opened.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._mux = mux
        self._inbox = bytearray()
        self._changed = asyncio.Event()
        self._credit = WINDOW
        self._unacknowledged = 0
        self._got_eof = False
        self._sent_eof = False
        self._reset: str | None = None

    @property
    def readable(self) -> bool:
        """Whether a read would return at once: data, end of file or a reset is there."""
        return bool(self._inbox) or self._got_eof or self._reset is not None

    async def read(self, limit: int = MAX_PAYLOAD) -> bytes:
        """Up to `limit` bytes; empty at the end of the stream.

        Raises:
            StreamResetError: The other end gave up before its end of file.
        """
        while not self.readable:
            await self._wait()

        if not self._inbox:
            if self._reset is not None:
                raise StreamResetError(self._reset)
            return b""

        data = bytes(self._inbox[:limit])
        del self._inbox[:limit]
        self._unacknowledged += len(data)
        if self._unacknowledged >= WINDOW // 2 and self._reset is None:
            self._mux.send(CREDIT, self.number, NUMBER.pack(self._unacknowledged))
            self._unacknowledged = 0
        return data

    async def write(self, data: bytes) -> None:
        """Hand `data` to the other end, waiting for its window and for the pipe.

        Raises:
            StreamResetError: The other end, or this one, has closed the stream.
        """
        view = memoryview(data)
        while view:
            while self._credit == 0 and self._reset is None:
                await self._wait()
            if self._reset is not None or self._sent_eof:
                raise StreamResetError(self._reset or "this end has been closed")

            piece = view[: min(self._credit, MAX_PAYLOAD)]
            self._credit -= len(piece)
            self._mux.send(DATA, self.number, bytes(piece))
            view = view[len(piece) :]
            await self._mux.drain()

    def write_eof(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        if not self._sent_eof and self._reset is None:
            self._sent_eof = True
            self._mux.send(EOF, self.number)
            self._settle()

    def close(self, reason: str = "closed") -> None:
        """Give the stream up, whatever state it is in; safe to call twice."""
        if self._reset is None and not (self._sent_eof and self._got_eof):
            self._mux.send(RESET, self.number, reason.encode()[:200])
        self.abandon(reason)

    def abandon(self, reason: str) -> None:
        """Forget the stream without telling the other end, which is gone or has said so itself."""
        if self._reset is None:
            self._reset = reason
        if not self.opened.done():
            self.opened.set_exception(StreamResetError(reason))
        self._mux.streams.pop(self.number, None)
        self._changed.set()

    def receive(self, kind: int, payload: bytes) -> None:
        """Take in one frame that the mux found to be for this stream.

        Raises:
            BrokenFrameError: More data than the window that was granted: the other end is not to be trusted.
        """
        if kind == DATA:
            if len(self._inbox) + len(payload) > WINDOW:
                msg = f"Stream {self.number} was sent more than its window of {WINDOW} bytes."
                raise BrokenFrameError(msg)
            self._inbox += payload
        elif kind == CREDIT:
            self._credit += NUMBER.unpack(payload)[0]
        elif kind == EOF:
            self._got_eof = True
            self._settle()
        elif kind == RESET:
            self.abandon(payload.decode(errors="replace"))
        elif kind == OPENED and not self.opened.done():
            self.opened.set_result(None)
        self._changed.set()

    def _settle(self) -> None:
        if self._got_eof and self._sent_eof:
            self._mux.streams.pop(self.number, None)

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Mux:
    """One end of the tunnel: reads and writes frames on two non-blocking file descriptors that it does not own.

    Args:
        on_open: Called with each stream that the other end opens; None on the host, where none may be.
        on_hello: Called with the nonce of each `HELLO`.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        on_open: Callable[[Stream], None] | None = None,
        on_hello: Callable[[bytes], None] | None = None,
    ) -> None:
        self.streams: dict[int, Stream] = {}
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._on_open = on_open
        self._on_hello = on_hello
        self._reader = FrameReader()
        self._next_number = 1
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._writing = False
        self._drained = asyncio.Event()
        self._drained.set()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to read."""
        self._loop.add_reader(self._read_fd, self._on_readable)

    def stop(self, reason: str) -> None:
        """Stop reading and writing and reset every stream; safe to call twice."""
        self._loop.remove_reader(self._read_fd)
        if self._writing:
            self._loop.remove_writer(self._write_fd)
            self._writing = False
        self._out.clear()
        self._out_bytes = 0
        self._drained.set()
        self.reset_streams(reason)
        if not self.closed.done():
            self.closed.set_result(None)

    def reset_streams(self, reason: str) -> None:
        """Give up every stream on this side only."""
        for stream in list(self.streams.values()):
            stream.abandon(reason)

    def open(self, port: int) -> Stream:
        """A new stream to a port of the guest; await its `opened` before using it."""
        if self.closed.done():
            msg = "the tunnel is closed"
            raise StreamResetError(msg)

        stream = Stream(self, self._next_number, port)
        self._next_number += 1
        self.streams[stream.number] = stream
        self.send(OPEN, stream.number, NUMBER.pack(port))
        return stream

    def send(self, kind: int, stream: int = 0, payload: bytes = b"") -> None:
        """Queue one frame; `drain` waits where much is queued."""
        self.send_raw(frame(kind, stream, payload))

    def send_raw(self, data: bytes) -> None:
        """Queue bytes that are frames already."""
        if self.closed.done():
            return

        self._out.append(data)
        self._out_bytes += len(data)
        if not self._writing:
            self._flush()
        if self._out_bytes > _HIGH_WATER:
            self._drained.clear()

    async def drain(self) -> None:
        """Wait until the pipe has taken enough of what is queued."""
        await self._drained.wait()

    def _flush(self) -> None:
        try:
            while self._out:
                data = self._out[0]
                written = os.write(self._write_fd, data)
                self._out_bytes -= written
                if written == len(data):
                    self._out.popleft()
                else:
                    self._out[0] = data[written:]
        except BlockingIOError:
            pass
        except OSError as error:
            self.stop(f"the pipe broke: {error}")
            return

        if self._out and not self._writing:
            self._loop.add_writer(self._write_fd, self._flush)
            self._writing = True
        elif not self._out and self._writing:
            self._loop.remove_writer(self._write_fd)
            self._writing = False
        if self._out_bytes <= _HIGH_WATER // 2:
            self._drained.set()

    def _on_readable(self) -> None:
        try:
            data = os.read(self._read_fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.stop(f"the pipe broke: {error}")
            return

        if not data:
            self.stop("the pipe was closed")
            return

        try:
            self.feed(data)
        except BrokenFrameError as error:
            self.stop(str(error))

    def feed(self, data: bytes) -> None:
        """Take in bytes that were read from the pipe."""
        for kind, number, payload in self._reader.feed(data):
            if kind == HELLO:
                if self._on_hello is not None:
                    self._on_hello(payload)
            elif kind == OPEN:
                if self._on_open is not None:
                    stream = Stream(self, number, NUMBER.unpack(payload)[0])
                    self.streams[number] = stream
                    self._on_open(stream)
            elif (known := self.streams.get(number)) is not None:
                # Frames for a stream that this end has given up are late, not wrong.
                known.receive(kind, payload)
