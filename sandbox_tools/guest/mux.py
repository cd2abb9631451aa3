"""Many streams over one pair of pipes, each at the pace of its own reader.

The host opens streams to the guest's ports, and the guest streams to the outside, where the host lets it; each numbers
its own. Each direction of a stream has a window: a sender spends credit and the receiver grants it
back as its reader reads, so a slow reader stops its own sender and nobody else.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from sandbox_tools.guest.frames import (
    CREDIT,
    DATA,
    EOF,
    HEADER,
    HELLO,
    MAX_PAYLOAD,
    NUMBER,
    OPEN,
    OPENED,
    RESET,
    BrokenFrameError,
    FrameReader,
    number_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 1 << 20
"""Bytes that may be under way in each direction of a stream before its reader has taken them."""

# Beyond this many queued bytes a writer waits for the pipe.
_HIGH_WATER = 1 << 19

# How many frames are looked at before others have their turn.
_TURN = 1024

# Up to this many bytes are joined rather than kept as pieces.
_SMALL = 1 << 12

# Bytes of a reason: it ends up in messages.
_REASON = 200

# How many pieces are written in one go; the kernel takes 1024.
_PIECES = 128


GUEST_NUMBERS = 1 << 31
"""From here on are the numbers of the streams that the guest opens."""


class StreamResetError(ConnectionError):
    """Raised when the other end gave the stream up, or the tunnel itself is gone."""


class Stream:
    """One byte stream through the tunnel, to or from a port of the guest.

    Read and written by coroutines, or without waiting by a `listener` that is called on every change.
    """

    def __init__(self, mux: Mux, number: int, port: int) -> None:
        self.number = number
        self.port = port
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The opener may be gone before the answer comes; nobody then needs to hear of it.
        self.opened.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.listener: Callable[[], None] | None = None
        self.got_eof = False
        self.sent_eof = False
        self.reset: str | None = None
        """Why the stream was given up. None: it was not."""
        self._mux = mux
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._changed = asyncio.Event()
        self._credit = WINDOW
        self._unacknowledged = 0

    @property
    def readable(self) -> bool:
        """Whether a read would return at once: data, end of file or a reset is there."""
        return bool(self._inbox) or self.got_eof or self.reset is not None

    @property
    def waiting(self) -> int:
        """Bytes that have come and were not taken yet."""
        return self._inbox_bytes

    async def read(self) -> bytes:
        """The next bytes, at most a frame's; empty at the end of the stream.

        Raises:
            StreamResetError: The other end gave up before its end of file.
        """
        while not self.readable:
            await self._wait()

        if not self._inbox and self.reset is not None:
            raise StreamResetError(self.reset)
        return self.take()

    def take(self) -> bytes:
        """What is there to read, at most a frame's; empty where nothing is."""
        if not self._inbox:
            return b""

        data = self._inbox.popleft()
        self._inbox_bytes -= len(data)
        self._unacknowledged += len(data)
        if self._unacknowledged >= WINDOW // 4 and self.reset is None and not self.got_eof:
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
            while self._credit == 0 and self.reset is None:
                await self._wait()
            if self.reset is not None or self.sent_eof:
                raise StreamResetError(self.reset or "this end has been closed")

            view = view[self.give(view) :]
            await self._mux.drain()

    def give(self, data: memoryview) -> int:
        """Hand over as much of `data` as the other end's window takes now; how many bytes that were."""
        count = min(len(data), self._credit)
        self._credit -= count
        for at in range(0, count, MAX_PAYLOAD):
            self._mux.send(DATA, self.number, data[at : min(at + MAX_PAYLOAD, count)])
        return count

    def send_opened(self) -> None:
        """Tell the other end, which has opened the stream, that it is served."""
        self._mux.send(OPENED, self.number)

    def write_eof(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        if not self.sent_eof and self.reset is None:
            self.sent_eof = True
            self._mux.send(EOF, self.number)
            self._settle()

    def close(self, reason: str = "closed") -> None:
        """Give the stream up, whatever state it is in; safe to call twice."""
        if self.reset is None and not (self.sent_eof and self.got_eof):
            self._mux.send(RESET, self.number, reason.encode()[:_REASON])
        self.abandon(reason)

    def abandon(self, reason: str) -> None:
        """Forget the stream without telling the other end, which is gone or has said so itself."""
        if self.reset is None:
            self.reset = reason
        if not self.opened.done():
            self.opened.set_exception(StreamResetError(reason))
        self._mux.streams.pop(self.number, None)
        self._tell()

    def receive(self, kind: int, payload: bytes) -> None:
        """Take in one frame that the mux found to be for this stream.

        Raises:
            BrokenFrameError: More data than the window that was granted, or no number where one belongs: the other
                end is not to be trusted.
        """
        if kind == DATA:
            self._inbox_bytes += len(payload)
            if self._inbox_bytes > WINDOW:
                msg = f"Stream {self.number} was sent more than its window of {WINDOW} bytes."
                raise BrokenFrameError(msg)
            if self._inbox and len(self._inbox[-1]) + len(payload) <= _SMALL:
                self._inbox[-1] += payload
            elif payload:
                self._inbox.append(payload)
        elif kind == CREDIT:
            self._credit += number_in(payload)
        elif kind == EOF:
            self.got_eof = True
            self._settle()
        elif kind == RESET:
            self.abandon(payload[:_REASON].decode(errors="replace"))
        elif kind == OPENED and not self.opened.done():
            self.opened.set_result(None)
        self._tell()

    def _settle(self) -> None:
        if self.got_eof and self.sent_eof:
            self._mux.streams.pop(self.number, None)

    def _tell(self) -> None:
        self._changed.set()
        if self.listener is not None:
            self.listener()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Mux:
    """One end of the tunnel: reads and writes frames on two non-blocking file descriptors that it does not own.

    Args:
        on_open: Called with each stream that the other end opens. None: each is refused.
        on_hello: Called with the nonce of each `HELLO`.
        first: The number of the first stream that this end opens: 1 or `GUEST_NUMBERS`.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        on_open: Callable[[Stream], None] | None = None,
        on_hello: Callable[[bytes], None] | None = None,
        first: int = 1,
    ) -> None:
        self.streams: dict[int, Stream] = {}
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._on_open = on_open
        self._on_hello = on_hello
        self._reader = FrameReader()
        self._unread = False
        self._first = first
        self._next_number = first
        self._out: deque[bytes | memoryview] = deque()
        self._out_bytes = 0
        self._flushing = False
        self._writing = False
        self._drained = asyncio.Event()
        self._drained.set()
        self._loop = asyncio.get_running_loop()

    def start(self, rest: bytes = b"") -> None:
        """Begin to read, after `rest`, which was read before."""
        self._loop.add_reader(self._read_fd, self._on_readable)
        try:
            self._take_in(self._reader.feed(rest))
        except BrokenFrameError as error:
            self.stop(str(error))

    def stop(self, reason: str) -> None:
        """Stop reading and writing and reset every stream; safe to call twice."""
        self._loop.remove_reader(self._read_fd)
        if self._writing:
            self._loop.remove_writer(self._write_fd)
            self._writing = False
        self._out.clear()
        self._out_bytes = 0
        self._drained.set()
        if not self.closed.done():
            self.closed.set_result(None)
        self.reset_streams(reason)

    def reset_streams(self, reason: str) -> None:
        """Give up every stream on this side only."""
        for stream in list(self.streams.values()):
            stream.abandon(reason)

    def open(self, port: int) -> Stream:
        """A new stream to a port of the guest, which may be written to before it is known to be `opened`.

        Raises:
            StreamResetError: The tunnel is closed.
        """
        if self.closed.done():
            msg = "the tunnel is closed"
            raise StreamResetError(msg)

        stream = Stream(self, self._next_number, port)
        self._next_number += 1
        self.streams[stream.number] = stream
        self.send(OPEN, stream.number, NUMBER.pack(port))
        return stream

    def send(self, kind: int, stream: int = 0, payload: bytes | memoryview = b"") -> None:
        """Queue one frame, to go out with all that are queued in this turn of the loop; `drain` waits for many."""
        if self.closed.done():
            return

        header = HEADER.pack(kind, stream, len(payload))
        if len(payload) <= _SMALL:
            self._out.append(header + payload)
        else:
            self._out += (header, payload)
        self._out_bytes += HEADER.size + len(payload)
        if self._out_bytes > _HIGH_WATER:
            self._drained.clear()
        if not self._flushing and not self._writing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    async def drain(self) -> None:
        """Wait until the pipe has taken enough of what is queued."""
        await self._drained.wait()

    def _flush(self) -> None:
        self._flushing = False
        try:
            while self._out:
                self._wrote(os.writev(self._write_fd, tuple(islice(self._out, _PIECES))))
        except BlockingIOError:
            pass
        except OSError as error:
            # Stopped already, where the descriptor is no longer this mux's to use.
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

    def _wrote(self, count: int) -> None:
        self._out_bytes -= count
        while count:
            first = self._out[0]
            if count < len(first):
                self._out[0] = memoryview(first)[count:]
                return
            count -= len(first)
            self._out.popleft()

    def _on_readable(self) -> None:
        if self._unread:
            # Whoever floods the pipe with tiny frames waits for its turn like everybody.
            return

        try:
            count = os.readv(self._read_fd, [self._reader.room()])
        except BlockingIOError:
            return
        except OSError as error:
            self.stop(f"the pipe broke: {error}")
            return

        if not count:
            self.stop("the pipe was closed")
            return

        self._reader.took(count)
        self._look()

    def _look(self) -> None:
        self._unread = False
        if self.closed.done():
            return

        try:
            frames = self._reader.frames(_TURN)
            self._take_in(frames)
        except BrokenFrameError as error:
            self.stop(str(error))
            return

        if len(frames) == _TURN:
            self._unread = True
            self._loop.call_soon(self._look)

    def _take_in(self, frames: list[tuple[int, int, bytes]]) -> None:
        for kind, number, payload in frames:
            if kind == HELLO:
                if self._on_hello is not None:
                    self._on_hello(payload)
            elif kind == OPEN:
                self._take_on(number, number_in(payload))
            elif (known := self.streams.get(number)) is not None:
                # Frames for a stream that this end has given up are late, not wrong.
                known.receive(kind, payload)

    def _take_on(self, number: int, port: int) -> None:
        if number in self.streams or (number < GUEST_NUMBERS) == (self._first < GUEST_NUMBERS):
            msg = f"Stream {number} is not one that the other end may open."
            raise BrokenFrameError(msg)

        stream = Stream(self, number, port)
        self.streams[number] = stream
        if self._on_open is None:
            stream.close("refused: nothing is let out")
        else:
            self._on_open(stream)
