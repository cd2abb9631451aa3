"""The guest's end of the tunnel: a stream of the engine's is served in here, or is a TCP connection to its port."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from sandbox_tools.guest import outside
from sandbox_tools.guest.frames import HELLO, enlarge
from sandbox_tools.guest.mux import GUEST_NUMBERS, Mux, Stream
from sandbox_tools.guest.transport import Relay, StreamTransport, break_off

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HOST = "127.0.0.1"


async def serve(
    read_fd: int,
    write_fd: int,
    services: Mapping[int, Callable[[], asyncio.Protocol]] | None = None,
    *,
    let_out: bool = False,
) -> None:
    """Serve the tunnel on two pipes until one of them is closed for good.

    A checkpoint may replace both pipes under the same numbers; the engine's next `HELLO` then starts a fresh epoch.

    Args:
        services: For each port that is served in this process, what makes a protocol for one connection to it: no
            socket lies in between.
        let_out: Whether programs in here find a port that leads through the tunnel to the outside.
    """
    for fd in (read_fd, write_fd):
        os.set_blocking(fd, False)
        enlarge(fd)
    tasks: set[asyncio.Task[None]] = set()

    def on_open(stream: Stream) -> None:
        if (service := (services or {}).get(stream.port)) is not None:
            stream.send_opened()
            StreamTransport(stream, service(), (HOST, stream.port)).start()
            return

        task = asyncio.create_task(_connect(stream))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def on_hello(nonce: bytes) -> None:
        mux.reset_streams("the engine attached anew")
        mux.send(HELLO, payload=nonce)

    mux = Mux(read_fd, write_fd, on_open=on_open, on_hello=on_hello, first=GUEST_NUMBERS)
    way_out = await outside.listen(mux) if let_out else None
    mux.start()
    try:
        await mux.closed
    finally:
        mux.stop("the guest is shutting down")
        if way_out is not None:
            way_out.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(stream: Stream) -> None:
    inner = Relay()
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: inner, HOST, stream.port)
    except OSError as error:
        stream.close(f"refused: {error.strerror or error}")
        return

    outer = StreamTransport(stream, Relay(transport))
    inner.peer = outer
    if stream.reset is not None:
        break_off(transport)
        return
    stream.send_opened()
    outer.start()
    transport.resume_reading()
