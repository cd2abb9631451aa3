"""A shell of a sandbox in this terminal: raw while it lasts, resized with its window, and as it was afterwards."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sandbox_tools.client import rpc
from sandbox_tools.errors import SandboxError

if TYPE_CHECKING:
    from sandbox_tools.client import Sandbox

OP = "shell"

AWAKE = 300
"""Seconds for which the sandbox is kept awake at a time, and renewed after a third of them."""


END = 5.0
"""Seconds that ending a shell which was cut off may take."""


async def attach(sandbox: Sandbox, *, user: str | None = None) -> int:
    """Run a login shell until it ends; its exit code.

    Raises:
        SandboxError: It could not be started, or was cut off.
    """
    start = {
        "process": {
            "cmd": "/bin/bash",
            "args": ["-i", "-l"],
            "envs": {"TERM": os.environ.get("TERM", "xterm-256color"), "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"},
        },
        "pty": {"size": _size()},
    }
    async with aclosing(rpc.stream(sandbox, "process.Process/Start", start, op=OP, user=user)) as events:
        pid = int((await anext(events))["event"]["start"]["pid"])
        helpers: list[asyncio.Task[None]] = []
        try:
            with _raw() as typed:
                helpers = [
                    asyncio.create_task(_send(sandbox, pid, typed)),
                    asyncio.create_task(_follow_size(sandbox, pid)),
                    asyncio.create_task(_keep_awake(sandbox)),
                ]
                async for message in events:
                    event = message.get("event", {})
                    if "end" in event:
                        pid = 0
                        return int(event["end"].get("exitCode", 0)) & 0xFF
                    if data := event.get("data", {}).get("pty"):
                        await asyncio.to_thread(_write, base64.b64decode(data))
        finally:
            for helper in helpers:
                helper.cancel()
            if pid:  # A shell that nobody looks at any more is not to run on.
                with suppress(SandboxError, TimeoutError):
                    async with asyncio.timeout(END):
                        await sandbox.commands.kill(pid)
    return 1


@contextmanager
def _raw() -> Iterator[asyncio.Queue[bytes]]:
    """The terminal, raw; what is typed comes by the queue."""
    loop, fd = asyncio.get_running_loop(), sys.stdin.fileno()
    before, typed = termios.tcgetattr(fd), asyncio.Queue[bytes]()
    tty.setraw(fd)
    loop.add_reader(fd, lambda: typed.put_nowait(os.read(fd, 4096)))
    try:
        yield typed
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def _send(sandbox: Sandbox, pid: int, typed: asyncio.Queue[bytes]) -> None:
    while True:
        data = await typed.get()
        while not typed.empty():
            data += typed.get_nowait()
        message = {"process": {"pid": pid}, "input": {"pty": base64.b64encode(data).decode()}}
        with suppress(SandboxError):  # Where the shell has ended, its own stream says so.
            await rpc.unary(sandbox, "process.Process/SendInput", message, op=OP)


async def _follow_size(sandbox: Sandbox, pid: int) -> None:
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        while True:
            await changed.wait()
            changed.clear()
            with suppress(SandboxError):
                await rpc.unary(
                    sandbox, "process.Process/Update", {"process": {"pid": pid}, "pty": {"size": _size()}}, op=OP
                )
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def _keep_awake(sandbox: Sandbox) -> None:
    while True:
        await asyncio.sleep(AWAKE / 3)
        with suppress(SandboxError):
            await sandbox.resume(timeout=AWAKE)


def _size() -> dict[str, Any]:
    size = os.get_terminal_size(sys.stdin.fileno())
    return {"cols": size.columns or 80, "rows": size.lines or 24}


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
