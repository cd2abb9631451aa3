"""What runs in a template before its image is taken: its start command, and the check that says when it is ready."""

from __future__ import annotations

import asyncio
import base64
import contextlib

from sandbox_tools.engine.http1 import Answer, request_head
from sandbox_tools.engine.tunnel import Tunnel
from sandbox_tools.errors import EngineError
from sandbox_tools.guest.envelopes import HEADER, Message, decode, encode, envelope
from sandbox_tools.models import ENVD_PORT

TAG = "start_cmd"
"""What the start command's process is found by in a sandbox."""

SETTLED = 2.0
"""Seconds that a start command without a ready check is given; it may fail meanwhile."""

_AGAIN = 0.5
_LAST_WORDS = 2000  # bytes


async def run(tunnel: Tunnel, *, start: str | None, ready: str | None, ready_seconds: float) -> None:
    """Run the start command, which goes on running, and wait until the template is ready.

    Args:
        start: A shell command of `user`. None: there is none.
        ready: A shell command of `user` that is repeated until it ends with 0. None: `SETTLED` is waited for.
        ready_seconds: How long it may take.

    Raises:
        EngineError: The start command ended with another exit code than 0, or the check was never passed; the message
            has their last words.
    """
    started = _Process(tunnel)
    following = asyncio.create_task(started.follow(start, tag=TAG)) if start else None
    try:
        if ready is not None:
            await _until_ready(tunnel, ready, ready_seconds, started, start)
        elif following is not None:
            await asyncio.wait((following,), timeout=SETTLED)
            _check(started, start)
    finally:
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following


async def _until_ready(tunnel: Tunnel, ready: str, seconds: float, started: _Process, start: str | None) -> None:
    # The last one that has something to tell: it may be time in the very beginning of another.
    last = _Process(tunnel)
    try:
        async with asyncio.timeout(seconds):
            while True:
                check = _Process(tunnel)
                if last.exit_code is None:
                    last = check
                await check.follow(ready)
                last = check
                if last.exit_code == 0:
                    return
                _check(started, start)
                await asyncio.sleep(_AGAIN)
    except TimeoutError:
        of_start = f" The start command's last words: {started.words}" if start else ""
        msg = (
            f"The template was not ready within {seconds:g} s: {ready!r} "
            f"{'did not end' if last.exit_code is None else f'ended with exit code {last.exit_code}'}. "
            f"Its last words: {last.words}.{of_start}"
        )
        raise EngineError(msg, op="build") from None


def _check(started: _Process, start: str | None) -> None:
    if started.exit_code:
        msg = f"The start command {start!r} ended with exit code {started.exit_code}. Its last words: {started.words}"
        raise EngineError(msg, op="build")


class _Process:
    """A shell command of `user` inside."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._said = b""
        self.exit_code: int | None = None
        """None: it runs."""

    @property
    def words(self) -> str:
        """The end of what it has written."""
        return self._said.decode(errors="replace").strip() or "none"

    async def follow(self, command: str, tag: str | None = None) -> None:
        """Start it and read what it writes, to its end. It goes on if this is cancelled."""
        message: Message = {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", command]}, "stdin": False}
        if tag is not None:
            message["tag"] = tag
        body = envelope(message)
        headers = {
            "Host": "sandbox",
            "Connection": "close",
            "Content-Length": str(len(body)),
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "Authorization": f"Basic {base64.b64encode(b'user:').decode()}",
        }
        sent = [(name.encode(), value.encode()) for name, value in headers.items()]
        stream = self._tunnel.begin(ENVD_PORT)
        try:
            await stream.write(request_head("POST", b"/process.Process/Start", sent) + body)
            answer, received = Answer("POST"), b""
            while not answer.complete and (data := await stream.read()):
                received += answer.feed(data)
                while len(received) >= HEADER.size:
                    stop = HEADER.size + HEADER.unpack_from(received)[1]
                    if len(received) < stop:
                        break
                    self._heard(decode(received[HEADER.size : stop]))
                    received = received[stop:]
        finally:
            stream.close()
        if self.exit_code is None:
            msg = f"{command!r} could not be run in the new template: {self.words}"
            raise EngineError(msg, op="build")

    def _heard(self, message: Message) -> None:
        if "error" in message:
            self._said += encode(message["error"])
        event = message.get("event", {})
        for text in event.get("data", {}).values():
            self._said = (self._said + base64.b64decode(text))[-_LAST_WORDS:]
        if "end" in event:
            self.exit_code = int(event["end"].get("exitCode", 0))
