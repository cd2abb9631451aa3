"""A stream of the tunnel as asyncio's transport, so that any protocol can be spoken over it without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from sandbox_tools.guest.mux import Stream, StreamResetError

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

# Beyond this many bytes that the other end's window doesn't take the protocol is asked to stop writing.
_HIGH_WATER = 1 << 18


class StreamTransport(asyncio.Transport):
    """One stream, spoken to by one protocol; paced both ways by the stream's windows.

    Args:
        stream: The stream; nobody else reads or writes it.
        protocol: What is told of all that comes.
        address: The name and port that the protocol takes to be its own.
    """

    def __init__(self, stream: Stream, protocol: asyncio.Protocol, address: tuple[str, int] | None = None) -> None:
        super().__init__({"sockname": address})
        self._stream = stream
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._reading = True
        self._told_eof = False
        self._write_paused = False
        self._ending = False
        self._closing = False
        self._lost = False

    def start(self) -> None:
        """Introduce the two to each other, and hand over what has come already."""
        self._protocol.connection_made(self)
        self._stream.listener = self._on_change
        self._on_change()

    # What the protocol calls.

    def write(self, data: Any) -> None:
        """Send `data`, now or when the other end's window takes it."""
        if self._lost or self._ending:
            return

        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        if not self._backlog and self._stream.reset is None:
            view = view[self._stream.give(view) :]
        if view:
            self._backlog.append(view)
            self._backlog_bytes += len(view)
        if self._backlog_bytes > _HIGH_WATER and not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Send all of it."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Yes."""
        return True

    def write_eof(self) -> None:
        """Say that nothing more is written, once what is queued has gone; reading goes on."""
        if not self._lost and not self._ending:
            self._ending = True
            self._flush()

    def pause_reading(self) -> None:
        """Take nothing more, so that the other end's window runs out."""
        self._reading = False

    def resume_reading(self) -> None:
        """Take what comes again."""
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._on_change)

    def is_reading(self) -> bool:
        """Whether what comes is taken."""
        return self._reading and not self._lost

    def close(self) -> None:
        """End it once what is queued has gone; what still comes is dropped."""
        if self._lost or self._closing:
            return

        self._closing = True
        self.write_eof()
        self._finish()

    def abort(self) -> None:
        """Break it at once, at both ends."""
        self._stream.close("the connection was broken off")

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._closing or self._lost

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Tell another protocol from now on."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.Protocol:
        """Who is told now."""
        return self._protocol

    def get_write_buffer_size(self) -> int:
        """Bytes that the other end's window has not taken yet."""
        return self._backlog_bytes

    # What the stream calls.

    def _on_change(self) -> None:
        if self._lost:
            return

        self._flush()
        try:
            self._deliver()
        except Exception as error:
            log.exception("A connection to port %d failed", self._stream.port)
            self._stream.close(f"{type(error).__name__}")
        if self._stream.reset is not None and not self._lost:
            # Not from here: the protocol may be in the middle of a call to this transport.
            self._loop.call_soon(self._lose, StreamResetError(self._stream.reset))

    def _deliver(self) -> None:
        while self._reading and not self._closing and (data := self._stream.take()):
            self._protocol.data_received(data)
        if self._stream.got_eof and not self._told_eof and self._reading and not self._stream.waiting:
            self._told_eof = True
            if not self._protocol.eof_received():
                self.close()
            self._finish()

    def _flush(self) -> None:
        while self._backlog and self._stream.reset is None:
            first = self._backlog[0]
            given = self._stream.give(first)
            self._backlog_bytes -= given
            if given < len(first):
                self._backlog[0] = first[given:]
                break
            self._backlog.popleft()
        if self._write_paused and self._backlog_bytes <= _HIGH_WATER // 2:
            self._write_paused = False
            self._protocol.resume_writing()
        if self._ending and not self._backlog:
            self._stream.write_eof()
            self._finish()

    def _finish(self) -> None:
        """Part from the protocol once nothing more is to be said on one side, and heard or wanted on the other."""
        if self._stream.sent_eof and (self._told_eof or self._closing) and not self._lost:
            self._loop.call_soon(self._lose, None)

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return

        self._lost = True
        self._stream.listener = None
        self._backlog.clear()
        self._backlog_bytes = 0
        self._protocol.connection_lost(error)


class Relay(asyncio.Protocol):
    """Passes what one transport hears on to another, with its pace and with how it ends.

    Args:
        peer: Where to. None: not known yet; nothing is heard until it is.
    """

    def __init__(self, peer: asyncio.Transport | None = None) -> None:
        self.peer = peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """This side is there."""
        if self.peer is None:
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        if self.peer is not None:
            self.peer.write(data)

    def eof_received(self) -> bool:
        """Pass it on; the other direction stays open, where the other side can do that."""
        if self.peer is None or not self.peer.can_write_eof():
            return False
        self.peer.write_eof()
        return True

    def pause_writing(self) -> None:
        """This side takes no more for now: let the other one bring no more."""
        if self.peer is not None:
            self.peer.pause_reading()

    def resume_writing(self) -> None:
        """This side takes more again."""
        if self.peer is not None:
            self.peer.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """This side is gone: in good order, and the other one may finish; or broken, and so is the other one then."""
        if self.peer is None:
            return
        if exc is None:
            self.peer.close()
        else:
            break_off(self.peer)


def break_off(transport: asyncio.Transport) -> None:
    """Break a connection so that its other end notices: nobody must take half a message for the whole of it."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
