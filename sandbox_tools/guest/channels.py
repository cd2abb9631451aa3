"""The guest's ends of a kernel's sockets: Jupyter's messages over plain ZeroMQ sockets that the loop watches.

`jupyter_client` has the same for any use, at a price: it would take half of the time of a short execution.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from zmq.constants import Flag, SocketOption, SocketType
from zmq.error import Again
from zmq.sugar.context import Context

if TYPE_CHECKING:
    from collections.abc import Mapping

DELIMITER = b"<IDS|MSG>"

QUEUED = 16
"""Messages that wait in the guest's socket at most; up to ZeroMQ's thousand more wait in the kernel."""

HANDFUL = 64
"""Messages that are thrown away before the loop gets its turn again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What came from a kernel."""

    kind: str
    """Jupyter's `msg_type`."""
    parent: str | None
    """The id of the request that it belongs to."""
    date: str
    """When it was made, in ISO 8601."""
    content: dict[str, Any]


class Channel:
    """One socket. One task at a time may wait for its messages."""

    def __init__(self, kind: SocketType, address: str, key: bytes) -> None:
        self._key = key
        self._session = uuid.uuid4().hex
        self._sent = 0
        self._discarding = False
        self._waiting: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._socket: Any = Context.instance().socket(kind)
        self._socket.linger = 0
        self._socket.rcvhwm = QUEUED
        if kind == SocketType.SUB:
            self._socket.subscribe(b"")
        self._socket.connect(address)
        self._loop.add_reader(self._socket.fileno(), self._on_news)

    def send(self, kind: str, content: Mapping[str, Any]) -> str:
        """Sends a request; returns its id."""
        self._sent += 1
        header = {
            "msg_id": f"{self._session}_{self._sent}",
            "session": self._session,
            "username": "guest",
            "date": datetime.now(UTC).isoformat(),
            "msg_type": kind,
            "version": "5.3",
        }
        # ASCII, so that a lone surrogate in the code is no trouble.
        frames = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        signature = hmac.digest(self._key, b"".join(frames), hashlib.sha256).hex().encode() if self._key else b""
        self._socket.send_multipart([DELIMITER, signature, *frames])
        return str(header["msg_id"])

    async def receive(self, patience: float) -> Message | None:
        """The next message; None when there was none for so many seconds."""
        deadline = None
        while True:
            # The socket's descriptor tells only of news: what had come before must be asked for.
            frames = self._take()
            if frames is not None:
                return _decoded(frames)
            if deadline is not None and self._loop.time() >= deadline:
                return None

            deadline = deadline or self._loop.time() + patience
            self._waiting = self._loop.create_future()
            timer = self._loop.call_at(deadline, self._wake)
            try:
                await self._waiting
            finally:
                self._waiting = None
                timer.cancel()

    def discard(self, throw_away: bool) -> None:
        """Whether messages are thrown away from now on, because nobody waits for them."""
        self._discarding = throw_away
        if throw_away:
            self._wake()

    def close(self) -> None:
        """Closes the socket; nobody may wait for it any more."""
        self._discarding = False
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _on_news(self) -> None:
        if self._waiting is None and not self._discarding:
            # The descriptor stays readable until somebody looks: the loop would spin for as long as code runs that
            # something comes during which nobody waits for yet.
            self._socket.getsockopt(SocketOption.EVENTS)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None:
            if not self._waiting.done():
                self._waiting.set_result(None)
        elif self._discarding:
            for _ in range(HANDFUL):
                if self._take() is None:
                    return
            self._loop.call_soon(self._wake)

    def _take(self) -> list[bytes] | None:
        try:
            frames: list[bytes] = self._socket.recv_multipart(Flag.DONTWAIT)
        except Again:
            return None

        return frames


def _decoded(frames: list[bytes]) -> Message:
    """A message from its frames. Its signature is not looked at: only the kernel can be at the socket's other end."""
    header, parent, _, content = frames[frames.index(DELIMITER) + 2 :][:4]
    head = json.loads(header)
    return Message(
        kind=head["msg_type"], parent=json.loads(parent).get("msg_id"), date=head["date"], content=json.loads(content)
    )
