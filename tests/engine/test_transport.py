"""Streams of the tunnel as transports, and the gateway over them: paced, ended and broken off as sockets would be."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from sandbox_tools.engine.gateway import forward
from sandbox_tools.engine.routing import Address
from sandbox_tools.engine.tunnel import Pipes, Tunnel
from sandbox_tools.guest import tunnel as guest
from sandbox_tools.guest.main import Server
from sandbox_tools.guest.mux import WINDOW, StreamResetError
from tests.conftest import own_state
from tests.engine.test_tunnel import opened

PORT = 49983


@contextlib.asynccontextmanager
async def tunnel_to(service: Callable[[], asyncio.Protocol]) -> AsyncIterator[Tunnel]:
    """A tunnel whose other end serves one port in this process."""
    with own_state() as directory:
        made = Pipes(Path(directory))
        made.make()
        with made.handed() as (stdin, stdout):
            serving = asyncio.create_task(guest.serve(stdin, stdout, {PORT: service}))
            tunnel = Tunnel(made)
            await tunnel.attach()
            try:
                async with asyncio.timeout(30):
                    yield tunnel
            finally:
                tunnel.detach("done")
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)


class Service(asyncio.Protocol):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.heard = b""
        self.writable = True
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_service_in_the_guests_process_is_spoken_to_without_a_socket() -> None:
    service = Service()
    async with tunnel_to(lambda: service) as tunnel:
        stream = await opened(tunnel, PORT)
        await stream.write(b"question")
        while service.heard != b"question":
            await asyncio.sleep(0)
        assert service.transport.get_extra_info("sockname") == ("127.0.0.1", PORT)

        service.transport.write(b"answer")
        assert await stream.read() == b"answer"


async def test_what_was_written_before_a_close_arrives_and_what_comes_after_is_dropped() -> None:
    service = Service()
    async with tunnel_to(lambda: service) as tunnel:
        stream = await opened(tunnel, PORT)
        much = os.urandom(3 * WINDOW)
        service.transport.write(much)
        service.transport.close()
        service.transport.write(b"too late")
        assert not service.lost.done()

        received = b""
        while piece := await stream.read():
            received += piece
        assert received == much
        assert await service.lost is None
        stream.write_eof()
        assert await stream.read() == b""


async def test_a_reader_that_stands_still_makes_the_service_stop_writing() -> None:
    service = Service()
    async with tunnel_to(lambda: service) as tunnel:
        stream = await opened(tunnel, PORT)
        written = 0
        while service.writable:
            service.transport.write(bytes(1 << 16))
            written += 1 << 16
            await asyncio.sleep(0)
        assert WINDOW < written < 4 * WINDOW

        received = 0
        while received < written:
            received += len(await stream.read())
        assert service.writable


async def test_a_service_that_stands_still_makes_the_client_stop_writing() -> None:
    service = Service()
    async with tunnel_to(lambda: service) as tunnel:
        stream = await opened(tunnel, PORT)
        service.transport.pause_reading()
        flood = asyncio.create_task(stream.write(bytes(8 * WINDOW)))
        await settle()
        assert not flood.done()
        assert service.heard == b""

        service.transport.resume_reading()
        await flood
        while len(service.heard) < 8 * WINDOW:
            await asyncio.sleep(0)


async def test_a_client_that_breaks_off_and_a_service_that_does_are_both_noticed() -> None:
    services = [Service(), Service()]
    async with tunnel_to(iter(services).__next__) as tunnel:
        (await opened(tunnel, PORT)).close("the client went away")
        assert isinstance(await services[0].lost, StreamResetError)

        stream = await opened(tunnel, PORT)
        reading = asyncio.create_task(stream.read())
        services[1].transport.abort()
        assert await asyncio.gather(reading, return_exceptions=True) == [reading.exception()]
        assert isinstance(reading.exception(), StreamResetError)


async def test_a_service_that_raises_loses_its_connection_and_no_other() -> None:
    class Broken(Service):
        def data_received(self, data: bytes) -> None:
            raise RuntimeError("broken")

    services = [Broken(), Service()]
    async with tunnel_to(iter(services).__next__) as tunnel:
        broken, sound = await opened(tunnel, PORT), await opened(tunnel, PORT)
        await broken.write(b"x")
        assert isinstance(await services[0].lost, StreamResetError)

        await sound.write(b"still here")
        while services[1].heard != b"still here":
            await asyncio.sleep(0)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads no more than a little, or speaks for long, as its path says."""
    if scope["path"] == "/up":
        await receive()
        await asyncio.Event().wait()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1 << 14):
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})


async def test_clients_that_leave_in_the_middle_leave_neither_streams_nor_tasks() -> None:
    loop = asyncio.get_running_loop()
    inside = Server(uvicorn.Config(application, lifespan="off", log_config=None, ws="none", http="httptools"))
    inside.config.load()
    inside.lifespan = inside.config.lifespan_class(inside.config)
    async with tunnel_to(inside.connection) as tunnel:
        address = Address(sandbox_id="i1", port=PORT)

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            await forward(tunnel, address, scope["headers"], scope, receive, send)

        outside = Server(uvicorn.Config(front, lifespan="off", log_config=None, ws="none", http="httptools"))
        outside.config.load()
        outside.lifespan = outside.config.lifespan_class(outside.config)
        server = await loop.create_server(outside.connection, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        before = asyncio.all_tasks()

        for path in ("/up", "/down") * 10:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf".encode())
            if path == "/down":
                await reader.readexactly(1 << 17)
            else:
                await settle()
            writer.transport.abort()

        mux: Any = tunnel._mux
        while mux.streams or inside.server_state.connections or outside.server_state.connections:
            await asyncio.sleep(0)
        while inside.server_state.tasks:
            # What waits inside for something else than its client is told only by being cancelled.
            for task in list(inside.server_state.tasks):
                task.cancel()
            await asyncio.sleep(0)
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0)
        server.close()
