"""The tunnel: what one end writes the other reads, whatever pipes, checkpoints and deaths do in between."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_tools.engine.tunnel import Pipes, Tunnel, is_refusal
from sandbox_tools.guest import tunnel as guest
from sandbox_tools.guest.frames import (
    DATA,
    HELLO,
    MAX_PAYLOAD,
    NUMBER,
    OPEN,
    RESYNC,
    BrokenFrameError,
    FrameReader,
    frame,
)
from sandbox_tools.guest.mux import GUEST_NUMBERS, WINDOW, Mux, Stream, StreamResetError
from tests.conftest import own_state

frames = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=12)


@given(frames, st.data())
def test_frames_come_out_as_they_went_in_however_they_were_cut(
    sent: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    raw = b"".join(frame(*each) for each in sent)
    reader = FrameReader()
    received = []
    while raw:
        cut = data.draw(st.integers(1, len(raw)))
        received += reader.feed(raw[:cut])
        raw = raw[cut:]

    assert received == sent


@given(st.integers(1, 7), st.binary(max_size=MAX_PAYLOAD), st.data())
def test_a_frame_cut_anywhere_is_healed_by_the_resync(kind: int, payload: bytes, data: st.DataObject) -> None:
    """An engine that dies in the middle of a frame must not leave its successor a deaf guest."""
    torn = frame(kind, 7, payload)
    torn = torn[: data.draw(st.integers(1, len(torn) - 1))]
    reader = FrameReader()

    received = reader.feed(torn + RESYNC + frame(HELLO, payload=b"n" * 16))

    assert received[-1] == (HELLO, 0, b"n" * 16)
    assert len(received) <= 2


def test_bytes_that_no_peer_would_send_are_refused() -> None:
    with pytest.raises(BrokenFrameError):
        FrameReader().feed(b"\xff" * 9)


@contextmanager
def pipes() -> Iterator[Pipes]:
    with own_state() as directory:
        made = Pipes(Path(directory))
        made.make()
        yield made


@asynccontextmanager
async def guest_on(made: Pipes) -> AsyncIterator[None]:
    with made.handed() as (stdin, stdout):
        serving = asyncio.create_task(guest.serve(stdin, stdout))
        try:
            yield
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def echo_server() -> AsyncIterator[tuple[int, list[str]]]:
    """Sends back what it gets until it gets the end; keeps how each connection ended."""
    endings: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            endings.append("end")
        except ConnectionError:
            endings.append("broken")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], endings


async def write_when_there_is_room(fd: int, data: bytes) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                assert os.write(fd, data) == len(data)
            except BlockingIOError:
                await asyncio.sleep(0)
            else:
                return


async def opened(tunnel: Tunnel, port: int) -> Stream:
    """A stream, once it is known that somebody listens."""
    stream = tunnel.begin(port)
    await stream.opened
    return stream


async def test_much_goes_through_many_streams_at_once_unharmed() -> None:
    with pipes() as made:
        async with guest_on(made), echo_server() as (port, _):
            tunnel = Tunnel(made)
            await tunnel.attach()

            async def echo(payload: bytes) -> bytes:
                stream = await opened(tunnel, port)
                writing = asyncio.create_task(stream.write(payload))
                received = b""
                while len(received) < len(payload):
                    received += await stream.read()
                await writing
                stream.write_eof()
                assert await stream.read() == b""
                return received

            payloads = [secrets.token_bytes(3 * WINDOW + number) for number in range(8)]
            assert await asyncio.gather(*map(echo, payloads)) == payloads
            tunnel.detach("done")


async def test_a_reader_that_stands_still_stops_its_own_writer_and_nobody_else() -> None:
    with pipes() as made:
        async with guest_on(made), echo_server() as (port, _):
            tunnel = Tunnel(made)
            await tunnel.attach()
            slow, quick = await opened(tunnel, port), await opened(tunnel, port)
            flood = asyncio.create_task(slow.write(b"x" * 64 * WINDOW))

            await quick.write(b"here")
            assert await quick.read() == b"here"

            # Both directions' windows and the sockets' own buffers, not 16 MB.
            assert not flood.done()
            flood.cancel()
            tunnel.detach("done")


def guest_mux(reading: int, writing: int) -> Mux:
    """A guest's end that lets every stream hang."""
    mux = Mux(
        reading,
        writing,
        on_open=lambda stream: None,
        on_hello=lambda nonce: mux.send(HELLO, payload=nonce),
        first=GUEST_NUMBERS,
    )
    return mux


async def test_a_stream_that_a_guest_opens_is_refused_where_nothing_is_let_out_and_served_where_something_is() -> None:
    for served in (False, True):
        with pipes() as made:
            taken: list[Stream] = []
            tunnel = Tunnel(made, taken.append if served else None)
            tunnel.open_pipes()
            fds = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in (made.stdin, made.stdout)]
            inside = guest_mux(*fds)
            inside.start()
            await tunnel.attach()

            stream = inside.open(1)
            await stream.write(b"out")
            if served:
                while not taken:
                    await asyncio.sleep(0)
                assert await taken[0].read() == b"out"
                assert tunnel.in_use == set()
            else:
                with pytest.raises(StreamResetError, match="nothing is let out"):
                    await stream.read()
            assert tunnel.attached
            inside.stop("done")
            tunnel.detach("done")
            for fd in fds:
                os.close(fd)


@pytest.mark.parametrize("number", [1, 5, GUEST_NUMBERS])
async def test_a_guest_that_opens_a_stream_of_the_hosts_or_one_twice_is_cut_off(number: int) -> None:
    with pipes() as made:
        tunnel = Tunnel(made, lambda stream: None)
        tunnel.open_pipes()
        fds = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in (made.stdin, made.stdout)]
        hostile = guest_mux(*fds)
        hostile.start()
        await tunnel.attach()
        stream = tunnel.begin(80)
        for _ in range(2):
            hostile.send(OPEN, number, NUMBER.pack(1))

        with pytest.raises(StreamResetError, match="may open"):
            await stream.read()
        assert not tunnel.attached
        hostile.stop("done")
        tunnel.detach("done")
        for fd in fds:
            os.close(fd)


async def test_a_guest_that_sends_more_than_its_window_is_cut_off() -> None:
    """What runs inside may be hostile: it must not fill the engine's memory."""
    with pipes() as made:
        tunnel = Tunnel(made)
        tunnel.open_pipes()
        fds = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in (made.stdin, made.stdout)]
        hostile = guest_mux(*fds)
        hostile.start()
        await tunnel.attach()
        opening = asyncio.create_task(opened(tunnel, 80))
        for _ in range(2 + WINDOW // MAX_PAYLOAD):
            hostile.send(DATA, 1, bytes(MAX_PAYLOAD))
            await hostile.drain()

        with pytest.raises(StreamResetError, match="window"):
            await opening
        hostile.stop("done")
        tunnel.detach("done")
        for fd in fds:
            os.close(fd)


hostile_bytes = st.lists(
    st.one_of(
        st.builds(frame, st.integers(0, 9), st.integers(0, 3), st.binary(max_size=40)),
        st.builds(lambda n, size: frame(OPEN, GUEST_NUMBERS + n, bytes(size)), st.integers(0, 3), st.integers(0, 5)),
        st.builds(lambda kind, size: frame(kind, 1, bytes(size)), st.integers(1, 7), st.sampled_from([4, MAX_PAYLOAD])),
        st.binary(max_size=40),
        st.just(bytes(5000)),
    ),
    max_size=30,
)


@given(hostile_bytes)
@settings(max_examples=60)
def test_whatever_a_hostile_guest_sends_ends_its_own_tunnel_at_most(pieces: list[bytes]) -> None:
    """The engine goes on, and so do the tunnels of other sandboxes; whoever waits for the hostile one is told."""

    async def attack() -> None:
        with pipes() as theirs, pipes() as others:
            async with guest_on(others), echo_server() as (port, _):
                good, bad = Tunnel(others), Tunnel(theirs)
                await good.attach()
                bad.open_pipes()
                stdin, stdout = (os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in (theirs.stdin, theirs.stdout))
                hostile = guest_mux(stdin, stdout)
                hostile.start()
                await bad.attach()
                streams = [bad.begin(80) for _ in range(3)]
                reads = [asyncio.create_task(stream.read()) for stream in streams]
                hostile.stop("from here on it is raw bytes")
                for piece in pieces:
                    while piece and bad.attached:
                        with suppress(BlockingIOError):
                            piece = piece[os.write(stdout, piece) :]
                        await asyncio.sleep(0)

                stream = await opened(good, port)
                await stream.write(b"untouched")
                assert await stream.read() == b"untouched"
                assert sum(stream.waiting for stream in streams) <= 3 * WINDOW
                good.detach("done")
                bad.detach("done")
                outcomes = await asyncio.gather(*reads, return_exceptions=True)
                assert all(isinstance(outcome, bytes | StreamResetError) for outcome in outcomes)
                for fd in (stdin, stdout):
                    os.close(fd)

    asyncio.run(asyncio.wait_for(attack(), 30))


async def test_a_port_where_nobody_listens_is_said_to_be_closed() -> None:
    with pipes() as made:
        async with guest_on(made):
            tunnel = Tunnel(made)
            await tunnel.attach()
            with pytest.raises(StreamResetError) as refused:
                await opened(tunnel, 1)
            assert is_refusal(refused.value)
            tunnel.detach("done")


async def test_a_client_that_goes_away_breaks_the_connection_inside() -> None:
    with pipes() as made:
        async with guest_on(made), echo_server() as (port, endings):
            tunnel = Tunnel(made)
            await tunnel.attach()
            stream = await opened(tunnel, port)
            await stream.write(b"hello")
            await stream.read()

            stream.close()

            async with asyncio.timeout(10):
                while not endings:
                    await asyncio.sleep(0)
            assert endings == ["broken"]
            tunnel.detach("done")


async def test_a_second_engine_takes_the_guest_over_from_one_that_died_in_the_middle() -> None:
    """Both directions hold torn frames and streams of the dead engine; the new one starts clean."""
    with pipes() as made:
        async with guest_on(made), echo_server() as (port, _):
            first = Tunnel(made)
            await first.attach()
            stream = await opened(first, port)
            # Far more than anybody reads: answers are under way when the engine dies.
            flood = asyncio.create_task(stream.write(b"x" * 8 * WINDOW))
            await stream.read()

            torn = os.open(made.stdin, os.O_RDWR | os.O_NONBLOCK)
            first.detach("died")
            with pytest.raises(StreamResetError):
                await flood
            await write_when_there_is_room(torn, frame(4, stream.number, b"y" * 1000)[:500])
            os.close(torn)

            second = Tunnel(made)
            await second.attach()
            stream = await opened(second, port)
            await stream.write(b"still there?")
            assert await stream.read() == b"still there?"
            second.detach("done")
