"""The engine's end of the tunnel: a pair of named pipes per sandbox, and streams through them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from typing import TYPE_CHECKING

from sandbox_tools.engine.kept import Kept
from sandbox_tools.errors import EngineError
from sandbox_tools.guest.frames import HELLO, NONCE_BYTES, PIPE_SIZE, RESYNC, enlarge, frame
from sandbox_tools.guest.mux import GUEST_NUMBERS, Mux, Stream, StreamResetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ATTACH_SECONDS = 30.0
"""How long a guest may take to answer: milliseconds, unless a loaded machine is still paging it in."""


def is_refusal(error: StreamResetError) -> bool:
    """Whether a stream was reset because nothing inside listens on its port."""
    return str(error).startswith("refused")


class Pipes:
    """The two named pipes of one sandbox, in its own directory.

    Each end opens them for reading and writing, so that neither sees an end of file when the other dies: a new engine
    finds what its predecessor left.
    """

    def __init__(self, directory: Path) -> None:
        self.stdin = directory / "stdin"
        self.stdout = directory / "stdout"

    def make(self) -> None:
        """Fresh pipes in place of any old ones: bytes meant for an earlier run must not reach the next."""
        for path in (self.stdin, self.stdout):
            path.unlink(missing_ok=True)
            os.mkfifo(path, 0o600)

    @contextlib.contextmanager
    def handed(self) -> Iterator[tuple[int, int]]:
        """File descriptors for a container's stdin and stdout; the container keeps its own copies."""
        stdin = os.open(self.stdin, os.O_RDWR | os.O_CLOEXEC)
        try:
            stdout = os.open(self.stdout, os.O_RDWR | os.O_CLOEXEC)
            try:
                yield stdin, stdout
            finally:
                os.close(stdout)
        finally:
            os.close(stdin)


class Tunnel:
    """Streams to the ports of one running sandbox.

    Args:
        on_open: Called with each stream that the guest opens. None: each is refused.
    """

    def __init__(self, pipes: Pipes, on_open: Callable[[Stream], None] | None = None) -> None:
        self._pipes = pipes
        self._on_open = on_open
        self._fds: list[int] = []
        self._mux: Mux | None = None
        self.kept = Kept()

    def open_pipes(self) -> None:
        """Hold the pipes open; before the container starts, so that it never finds them without a peer."""
        for path in (self._pipes.stdin, self._pipes.stdout):
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._fds.append(fd)
            enlarge(fd)

    async def attach(self, seconds: float = ATTACH_SECONDS) -> None:
        """Agree with the guest on a fresh epoch; streams can be opened afterwards.

        Raises:
            EngineError: The guest did not answer within `seconds`.
        """
        if not self._fds:
            self.open_pipes()

        nonce = secrets.token_bytes(NONCE_BYTES)
        try:
            async with asyncio.timeout(seconds):
                await self._write_all(RESYNC + frame(HELLO, payload=nonce))
                rest = await self._read_past(frame(HELLO, payload=nonce))
        except TimeoutError:
            msg = f"The guest did not answer within {seconds:.0f} s. Try again, or kill the sandbox if it stays silent."
            raise EngineError(msg, op="attach") from None

        self._mux = Mux(self._fds[1], self._fds[0], on_open=self._on_open)
        self._mux.start(rest)

    @property
    def attached(self) -> bool:
        """Whether streams can be opened; a guest that breaks the rules of the tunnel ends that."""
        return self._mux is not None and not self._mux.closed.done()

    @property
    def in_use(self) -> set[int]:
        """The ports that somebody has a stream to."""
        streams = self._mux.streams.values() if self._mux is not None else ()
        # What the sandbox has opened itself is nobody's use of it.
        return {stream.port for stream in streams if stream.number < GUEST_NUMBERS and stream not in self.kept}

    def detach(self, reason: str) -> None:
        """Drop every stream and let go of the pipes; the guest is left as it is. Safe to call twice."""
        if self._mux is not None:
            self._mux.stop(reason)
            self._mux = None
        while self._fds:
            os.close(self._fds.pop())

    def begin(self, port: int) -> Stream:
        """A stream to a port inside that may be written to at once, before it is known whether somebody listens.

        Those that are kept to that port are ended first: its server may serve one at a time.

        Raises:
            StreamResetError: The sandbox is going away.
        """
        if self._mux is None:
            msg = "the tunnel is not attached"
            raise StreamResetError(msg)
        self.kept.part(port)
        return self._mux.open(port)

    async def _write_all(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fds[0], data) :]
            except BlockingIOError:
                await self._ready(self._fds[0], writing=True)

    async def _read_past(self, mark: bytes) -> bytes:
        """Drop everything up to and including `mark`, which may come in pieces; return what follows it."""
        seen = b""
        while (at := seen.find(mark)) < 0:
            seen = seen[-len(mark) :]
            try:
                seen += os.read(self._fds[1], PIPE_SIZE)
            except BlockingIOError:
                await self._ready(self._fds[1], writing=False)
        return seen[at + len(mark) :]

    async def _ready(self, fd: int, *, writing: bool) -> None:
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
        add(fd, event.set)
        try:
            await event.wait()
        finally:
            remove(fd)
