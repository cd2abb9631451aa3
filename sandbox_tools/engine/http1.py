"""HTTP/1.1 over one stream of a tunnel: how a request is written, and how what a sandbox answers is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import httptools

from sandbox_tools.engine.tunnel import Tunnel

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1: these are between two hops and not passed on.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)

# RFC 9110 section 5: what is sent inside decides neither how a server frames its answer nor what its log looks like.
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")

MAX_HEAD = 1 << 18
"""Bytes of a head, beyond which it is not one."""


class BadAnswerError(ConnectionError):
    """Raised when what came from a port is not an HTTP/1.1 answer, or ends too early to be one."""


def request_head(method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A request's first bytes, up to its body."""
    lines = [method.encode() + b" " + target + b" HTTP/1.1", *(name + b": " + value for name, value in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Without what belongs to one hop only, by its name or because `Connection` lists it; names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    listed = {token.strip().lower() for name, value in lowered if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP and name not in listed]


class Answer:
    """One answer, read from any pieces of bytes; does no I/O.

    Args:
        method: Of the request: the answer to HEAD has no body whatever its headers say.
    """

    def __init__(self, method: str) -> None:
        self.status = 0
        """0 until the head is there; interim answers (1xx) are passed over, but for 101."""
        self.headers: Headers = []
        self.continued = False
        """Whether the server asked for the body (100)."""
        self.complete = False
        self.persistent = False
        """Whether its server lets another request follow on the same connection (RFC 9112 section 9.3)."""
        self._no_body = method == "HEAD"
        self._fresh: Headers = []
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._parser = httptools.HttpResponseParser(self)

    @property
    def begun(self) -> bool:
        """Whether any of it is there."""
        return self._head_bytes > 0

    def feed(self, data: bytes) -> bytes:
        """The part of the body that is in `data`.

        After a 101 it is what follows the head: bytes of another protocol.

        Raises:
            BadAnswerError: It is no HTTP/1.1 answer.
        """
        if not self.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.complete = True
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            if not self.complete:
                msg = f"not an HTTP answer: {error}"
                raise BadAnswerError(msg) from None
            self.persistent = False

        if not self.status and self._head_bytes > MAX_HEAD:
            msg = f"a head of more than {MAX_HEAD} bytes"
            raise BadAnswerError(msg)

        pieces, self._body = self._body, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def end(self) -> None:
        """The stream has ended, which is how an answer without any length ends.

        Raises:
            BadAnswerError: This one is not whole.
        """
        names = {name for name, _ in self.headers}
        if not self.complete and (not self.status or names & {b"content-length", b"transfer-encoding"}):
            msg = "it ended before its end"
            raise BadAnswerError(msg)
        self.complete = True

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer; one more than was asked for, perhaps."""
        self.persistent = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or after the body one trailer, which is dropped."""
        if not self.status:
            self._fresh.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """A head is there, an interim one perhaps."""
        if self.status:
            return  # of a second answer, which nobody asked for

        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.continued = self.continued or status == 100
            self._fresh = []
            return

        if not 100 < status < 600 or not all(_NAME.fullmatch(n) and _VALUE.fullmatch(v) for n, v in self._fresh):
            msg = "a head that can't be passed on"
            raise BadAnswerError(msg)
        self.status, self.headers = status, self._fresh
        self.complete = self._no_body

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self.complete:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The end of an answer, which an interim one is not."""
        if self.status and not self.complete:
            self.complete, self.persistent = True, self._parser.should_keep_alive()


async def call(
    tunnel: Tunnel, port: int, method: str, target: str, *, headers: Mapping[str, str], body: bytes
) -> tuple[int, bytes]:
    """One small exchange with a port inside; its status and body.

    Raises:
        BadAnswerError: What came is no answer.
        StreamResetError: Nobody listens there, or the sandbox is going away.
    """
    sent = {"Host": "sandbox", "Connection": "close", "Content-Length": str(len(body)), **headers}
    head = request_head(method, target.encode(), [(name.encode(), value.encode()) for name, value in sent.items()])
    stream = tunnel.begin(port)
    try:
        await stream.write(head + body)
        answer, received = Answer(method), b""
        while not answer.complete:
            if data := await stream.read():
                received += answer.feed(data)
            else:
                answer.end()
    finally:
        stream.close()
    return answer.status, received
