"""The guest's end of the tunnel: each stream of the engine's becomes a TCP connection on the sandbox's loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct

from sandbox_tools.guest.mux import HELLO, MAX_PAYLOAD, OPENED, Mux, Stream, StreamResetError


async def serve(read_fd: int, write_fd: int) -> None:
    """Serve the tunnel on two pipes until one of them is closed for good.

    A checkpoint may replace both pipes under the same numbers; the engine's next `HELLO` then starts a fresh epoch.
    """
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    tasks: set[asyncio.Task[None]] = set()

    def on_open(stream: Stream) -> None:
        task = asyncio.create_task(_connect(mux, stream))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def on_hello(nonce: bytes) -> None:
        mux.reset_streams("the engine attached anew")
        mux.send(HELLO, payload=nonce)

    mux = Mux(read_fd, write_fd, on_open=on_open, on_hello=on_hello)
    mux.start()
    try:
        await mux.closed
    finally:
        mux.stop("the guest is shutting down")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(mux: Mux, stream: Stream) -> None:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", stream.port)
    except OSError as error:
        stream.close(f"refused: {error.strerror or error}")
        return

    mux.send(OPENED, stream.number)
    inward = asyncio.create_task(_into_guest(stream, writer))
    outward = asyncio.create_task(_out_of_guest(reader, stream))
    try:
        # A reset is seen by whichever side reads or writes next; it must end the other side as well.
        await asyncio.gather(inward, outward)
    except (StreamResetError, OSError) as error:
        stream.close(str(error))
        _reset(writer)
    finally:
        inward.cancel()
        outward.cancel()
        stream.close()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _into_guest(stream: Stream, writer: asyncio.StreamWriter) -> None:
    while data := await stream.read():
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _out_of_guest(reader: asyncio.StreamReader, stream: Stream) -> None:
    while data := await reader.read(MAX_PAYLOAD):
        await stream.write(data)
    stream.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection: a server inside must not take half a request for the whole of it."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
