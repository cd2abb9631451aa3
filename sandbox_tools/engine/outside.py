"""The way out of a sandbox: an HTTP proxy of the engine's that calls what `reach` permits, and nothing else.

A sandbox has no network but loopback, with or without this. Inside, a port of the guest's (`guest.outside`) passes each
connection on through the tunnel; here its request is read, the name in it looked up, every address judged, and one
that may be reached is called by its number: what a name means afterwards changes nothing. So it needs neither root nor
a network of the sandbox's own, nothing of it is left when an engine dies, and a sandbox that wakes has it again.

Why no network of its own: `runsc` 20240729 takes every network namespace for the host's where the kernel shows
`net.core.rmem_default` in all of them (Linux 6.18 does), and refuses `--network=sandbox` there ("cannot run with
network enabled in root network namespace"); and only root could make one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv6Address

from sandbox_tools.engine.reach import Address, Rules, may_reach, parsed
from sandbox_tools.guest.mux import Stream, StreamResetError
from sandbox_tools.guest.transport import Relay, StreamTransport

log = logging.getLogger(__name__)

MOST = 128
"""Connections of one sandbox at a time: each may have a window of bytes waiting in the engine's memory."""

HEAD_BYTES = 64 << 10

_LOOKUPS = 4
"""Names of one sandbox that are looked up at a time."""

# Of their own: a name may take half a minute not to be found, and the engine's threads have snapshots to write.
_threads = ThreadPoolExecutor(32, thread_name_prefix="lookup")

_SECONDS = 30.0
"""For each of: a request to come, a name to be found, a server to answer."""

_HOP = re.compile(rb"(?i)^(?:proxy-[a-z-]+|connection|keep-alive)$")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a sandbox asks the proxy for.

    Attributes:
        first: What the server is sent before all else; empty where the sandbox speaks to it directly (`CONNECT`).
    """

    host: str
    port: int
    first: bytes

    @property
    def tunnelled(self) -> bool:
        """Whether it is told that the connection stands."""
        return not self.first


class RefusedError(Exception):
    """Raised for a request that is not carried out; `status` is what its sender is answered."""

    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


def parse(head: bytes) -> Request:
    """A request's head, without the empty line behind it.

    Raises:
        RefusedError: It is none that a proxy can carry out.
    """
    line, *fields = head.split(b"\r\n")
    method, _, rest = line.partition(b" ")
    target, _, version = rest.rpartition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "This is a proxy for HTTP/1.1.")
    if method == b"CONNECT":
        host, port = _authority(target, None)
        return Request(host=host, port=port, first=b"")

    scheme, _, rest = target.partition(b"://")
    if scheme.lower() != b"http":
        raise RefusedError(HTTPStatus.BAD_REQUEST, "A proxy is asked for `http://...`, or with CONNECT.")
    end = min((at for at in (rest.find(each) for each in (b"/", b"?")) if at >= 0), default=len(rest))
    host, port = _authority(rest[:end].rpartition(b"@")[2], 80)
    path = rest[end:] if rest[end : end + 1] == b"/" else b"/" + rest[end:]
    # Each request comes on a connection of its own: the next one may be for another server.
    kept = [each for each in fields if not _HOP.match(each.partition(b":")[0].strip())]
    first = b"\r\n".join([method + b" " + path + b" " + version, *kept, b"Connection: close", b"", b""])
    return Request(host=host, port=port, first=first)


def _authority(text: bytes, port: int | None) -> tuple[str, int]:
    found = re.fullmatch(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", text)
    number = int(found[2]) if found and found[2] else port
    if not found or number is None or not 0 < number < 65536:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"{text[:80].decode('ascii', 'replace')!r} is no host and port.")
    return found[1].decode().strip("[]"), number


def is_own(address: Address) -> bool:
    """Whether an address is this machine's: the kernel then speaks to it from itself. Nothing is sent to find out."""
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:  # there is no way to it
            return False
        return parsed(probe.getsockname()[0]) == address


class WayOut:
    """What one sandbox's connections to the outside go through, while its tunnel lasts.

    Args:
        rules: What it may reach now. None: nothing is let out.
    """

    def __init__(self, sandbox_id: str, rules: Callable[[], Rules | None]) -> None:
        self._sandbox_id = sandbox_id
        self._rules = rules
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._lookups = asyncio.Semaphore(_LOOKUPS)

    def __call__(self, stream: Stream) -> None:
        """Serve a stream that the guest has opened."""
        rules = self._rules()
        if rules is None:
            stream.close("refused: nothing is let out")
            return

        if self._open >= MOST:
            stream.close(f"refused: a sandbox may have {MOST} connections to the outside at a time")
            return

        self._open += 1
        task = asyncio.create_task(self._serve(stream, rules))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ended(self) -> None:
        self._open -= 1

    async def _serve(self, stream: Stream, rules: Rules) -> None:
        handed_over = False
        try:
            stream.send_opened()
            async with asyncio.timeout(_SECONDS):
                head, rest = await _head(stream)
            request = parse(head)
            outer = _Outside(self._ended)
            transport = await self._connect(request, rules, outer)
            handed_over = True
            inner = StreamTransport(stream, Relay(transport))
            outer.peer = inner
            transport.write(request.first + rest)
            inner.start()
            if request.tunnelled:
                inner.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            transport.resume_reading()
        except RefusedError as error:
            log.info("Sandbox %s is refused a connection: %s", self._sandbox_id, error)
            await _answer(stream, error)
        except TimeoutError:
            stream.close("refused: no request came")
        except StreamResetError:
            pass  # the sandbox, or its program, is gone
        finally:
            if not handed_over:
                self._ended()

    async def _connect(self, request: Request, rules: Rules, protocol: _Outside) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        why = "it can't be reached"
        for address in await _addresses(request, rules, self._lookups):
            try:
                async with asyncio.timeout(_SECONDS):
                    transport, _ = await loop.create_connection(lambda: protocol, str(address), request.port)
            except (OSError, TimeoutError) as error:
                why = os.strerror(error.errno).lower() if error.errno else "it does not answer"
            else:
                return transport
        raise RefusedError(HTTPStatus.BAD_GATEWAY, f"{request.host}:{request.port} could not be called: {why}.")


class _Outside(Relay):
    """The connection to the server."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._on_end = on_end

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()
        super().connection_lost(exc)


def _look_up(request: Request) -> list[str]:
    found = socket.getaddrinfo(request.host, request.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(each[4][0]) for each in found]


async def _addresses(request: Request, rules: Rules, lookups: asyncio.Semaphore) -> list[Address]:
    """Where a request may go, all judged after the name was looked up."""
    try:
        async with asyncio.timeout(_SECONDS):
            async with lookups:
                found = await asyncio.get_running_loop().run_in_executor(_threads, _look_up, request)
    except (OSError, TimeoutError, UnicodeError):
        raise RefusedError(HTTPStatus.BAD_GATEWAY, f"{request.host} is a name without an address.") from None

    addresses = [address for each in found if (address := parsed(each)) is not None]
    public = [address for address in addresses if may_reach(address, own=is_own)]
    if not public:
        words = f"{request.host} is not on the internet: private, local and metadata addresses are closed."
        raise RefusedError(HTTPStatus.FORBIDDEN, words)
    permitted = [address for address in public if rules.permit(request.host, address)]
    if not permitted:
        raise RefusedError(HTTPStatus.FORBIDDEN, f"{request.host} is denied by the rules of this sandbox.")
    return permitted


async def _head(stream: Stream) -> tuple[bytes, bytes]:
    """A request's head, and what has come behind it."""
    seen = b""
    while (end := seen.find(b"\r\n\r\n")) < 0:
        if len(seen) > HEAD_BYTES:
            raise RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's head is too long.")
        piece = await stream.read()
        if not piece:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "The request ends before its head does.")
        seen += piece
    return seen[:end], seen[end + 4 :]


async def _answer(stream: Stream, error: RefusedError) -> None:
    body = f"{error}\n".encode()
    head = (
        f"HTTP/1.1 {error.status} {error.status.phrase}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "\r\n",
    )
    try:
        await stream.write("\r\n".join(head).encode() + body)
        stream.write_eof()
        async with asyncio.timeout(5):
            while await stream.read():
                pass  # whatever it had still to say: broken off, it might not read the answer
    except (StreamResetError, TimeoutError):
        stream.close()
