"""Connect's side of the caller, as far as tests need it: envelopes apart, and the events of a process together."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sandbox_tools.guest.envelopes import HEADER

STREAM = {"content-type": "application/connect+json", "connect-protocol-version": "1"}


class Envelopes:
    """Cuts a stream of bytes into flags and messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """Those that are complete."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            flags, length = HEADER.unpack_from(self._buffer)
            stop = HEADER.size + length
            if len(self._buffer) < stop:
                return
            payload = bytes(self._buffer[HEADER.size : stop])
            del self._buffer[:stop]
            yield flags, json.loads(payload)


@dataclass(kw_only=True)
class Followed:
    """What one saw of a process."""

    pid: int | None = None
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    pty: bytearray = field(default_factory=bytearray)
    keepalives: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    """The longest chunk of each kind."""
    end: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    """How the stream failed. None: it ended well, or was broken off."""
    closed: bool = False
    """Whether the stream came to its end."""

    def take(self, found: Iterable[tuple[int, Any]]) -> None:
        """Adds envelopes, which must come in the order that clients rely on."""
        for flags, message in found:
            assert not self.closed
            if flags == 2:
                self.closed, self.error = True, message.get("error")
                continue
            ((kind, event),) = message["event"].items()
            assert self.end is None
            assert (self.pid is None) == (kind == "start"), message
            if kind == "start":
                self.pid = event["pid"]
            elif kind == "data":
                ((stream, text),) = event.items()
                data = base64.b64decode(text, validate=True)
                self.sizes[stream] = max(self.sizes.get(stream, 0), len(data))
                getattr(self, stream).extend(data)
            elif kind == "keepalive":
                self.keepalives += 1
            else:
                self.end = event


def bash(script: str, *, login: bool = False, **more: Any) -> dict[str, Any]:
    """The message that starts a command.

    Args:
        login: As the SDKs do. On a developer's own machine that runs whatever the developer has a login do.
    """
    config = {name: more.pop(name) for name in ("envs", "cwd") if name in more}
    args = ["-l", "-c", script] if login else ["-c", script]
    return {"process": {"cmd": "/bin/bash", "args": args, **config}, "stdin": False, **more}


def basic(user: str) -> dict[str, str]:
    """The header that names a user."""
    return {"authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()}
