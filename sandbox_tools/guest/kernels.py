"""One Jupyter kernel: its process, its sockets, and the request it is working on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, Self

import zmq.asyncio
from jupyter_client.manager import AsyncKernelManager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sandbox_tools.guest.accounts import Account

logger = logging.getLogger(__name__)

TICK = 0.25
"""Seconds of silence after which a kernel's process is looked at.

Waits are counted in ticks, never measured against a clock: a sandbox may sleep for days between two lines of this
file, and a deadline set before would be over when it wakes. A nap costs one tick at most.
"""

START_TICKS = 480
"""How long a kernel may take to answer for the first time."""

QUEUED = 16
"""Messages that wait in the guest's socket at most; up to ZeroMQ's thousand more wait in the kernel."""

STDERR_TAIL = 4096  # bytes

IN_KERNEL = Path(__file__).with_name("in_kernel.py")

LOAD = """\
def _load(source, file):
    import sys, types
    module = sys.modules["_sandbox"] = types.ModuleType("_sandbox")
    exec(compile(source, file, "exec"), module.__dict__)
    module.tame_output()
_load({source!r}, {file!r})
del _load
"""

ARGUMENTS = (
    "--HistoryManager.enabled=False",  # no SQLite file, and no thread that writes it
    "--InteractiveShell.colors=nocolor",  # tracebacks are read by a model
    "--InteractiveShellApp.exec_PYTHONSTARTUP=False",
)


class KernelDiedError(Exception):
    """Raised when the kernel's process has ended; the text says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What all kernels of a guest have in common."""

    account: Account
    directory: Path
    """Private to the account: sockets, connection files and IPython's own directory live here."""
    cwd: Path
    """Where a context begins that names no directory."""
    memory_limit: int | None = None
    """Bytes that a kernel may fill. None: no limit."""
    warm_up: bool = False
    """Whether the default context begins with what most code imports."""


class Kernel:
    """A running kernel; made by `start`, of use to one request at a time."""

    def __init__(self, manager: Any, client: Any, process: subprocess.Popen[bytes], stderr: int) -> None:
        self._manager = manager
        self._client = client
        self._process = process
        self._stderr = stderr
        self._tail = b""
        self._request: str | None = None
        self._idle = False

    @classmethod
    async def start(cls, launch: Launch, *, cwd: Path, env: Mapping[str, str]) -> Self:
        """Starts a kernel and waits until it has answered.

        Raises:
            KernelDiedError: It ended, or never answered.
            OSError: It could not be started, for instance because `cwd` is not there.
        """
        sockets: Any = zmq.asyncio.Context.instance()
        sockets.rcvhwm = QUEUED
        manager: Any = AsyncKernelManager(
            transport="ipc", context=sockets, connection_file=str(launch.directory / f"{secrets.token_hex(4)}.json")
        )
        # Whoever can reach the sockets can read the key as well, so that signing would only cost time.
        manager.session.key = b""
        manager.write_connection_file()
        launch.account.own(Path(manager.connection_file))

        limit = launch.memory_limit
        account = launch.account
        switch: dict[str, Any] = {} if account.uid is None else {"user": account.uid, "group": account.gid}
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            await manager.start_kernel(
                extra_arguments=list(ARGUMENTS),
                # Standard output of the guest may be the tunnel: nobody else may write to it.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=writing,
                cwd=str(cwd),
                env={
                    **account.environment(),
                    "IPYTHONDIR": str(launch.directory),  # else it litters the user's home
                    # Each thread's own arena would reserve 64 MiB of what is limited, and never fill it.
                    **({"MALLOC_ARENA_MAX": "2"} if limit else {}),
                    **env,
                },
                **switch,
                **({"extra_groups": account.groups} if switch else {}),
            )
        except BaseException:
            os.close(reading)
            await manager.shutdown_kernel(now=True)
            raise
        finally:
            os.close(writing)

        kernel = cls(manager, manager.client(context=sockets), manager.provisioner.process, reading)
        asyncio.get_running_loop().add_reader(reading, kernel._read_stderr)
        try:
            await kernel._become_ready()
            await kernel.limit_memory(limit)
        except BaseException as error:
            if isinstance(error, KernelDiedError):
                logger.error("A kernel did not come up: %s", kernel._tail.decode(errors="replace"))
            await kernel.stop()
            raise

        return kernel

    @property
    def pid(self) -> int:
        """The process id of the kernel."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the process; negative is a signal, as in `subprocess`. None: it runs."""
        return self._process.poll()

    @property
    def died(self) -> KernelDiedError:
        """How the process ended, in words."""
        code = self.exit_code
        if code is None or code >= 0:
            return KernelDiedError(f"exit code {code}")

        hint = ", often for want of memory" if code == -signal.SIGKILL else ""
        return KernelDiedError(f"signal {-code}, {signal.Signals(-code).name}{hint}")

    @property
    def busy(self) -> bool:
        """Whether a request is under way, also one that nobody follows any more."""
        return self._request is not None

    async def request(
        self, code: str, *, silent: bool = False, deliver: Callable[[Any], Awaitable[None]] | None = None
    ) -> dict[str, Any]:
        """Runs code and returns the kernel's reply; output goes to `deliver`, which may take its time.

        When this is cancelled the code goes on: call `follow` to learn when it is over.

        Args:
            silent: Leave no trace in the counter and the history.

        Raises:
            KernelDiedError: The process ended; all output that it sent before has been delivered.
        """
        self._idle = False
        self._request = self._client.execute(
            code, silent=silent, store_history=not silent, allow_stdin=False, stop_on_error=False
        )
        return await self.follow(deliver)

    async def follow(self, deliver: Callable[[Any], Awaitable[None]] | None = None) -> dict[str, Any]:
        """Waits until the request under way is over; returns and raises as `request` does."""
        while not self._idle:
            message = await self._next(self._client.get_iopub_msg)
            ours = message["parent_header"].get("msg_id") == self._request
            if ours and message["msg_type"] == "status":
                self._idle = message["content"]["execution_state"] == "idle"
            elif deliver and (ours or message["msg_type"] == "stream"):
                # Threads that earlier code left behind write under its name: whoever is there now gets to see it.
                await deliver(message)

        while True:
            message = await self._next(self._client.get_shell_msg)
            if message["parent_header"].get("msg_id") == self._request:
                self._request = None
                reply: dict[str, Any] = message["content"]
                return reply

    async def discard(self) -> None:
        """Throws away, until cancelled, what background threads print while nobody listens."""
        while True:
            await self._client.get_iopub_msg()

    def interrupt(self, *, group: bool) -> None:
        """Sends SIGINT.

        Args:
            group: Also to every process of the kernel's group. That reaches a child which the kernel waits for
                deafly, as in `os.system`, but also what earlier code started in the background.
        """
        self._signal(signal.SIGINT, group=group)

    def kill(self, *, group: bool = False) -> None:
        """Kills the process, or with `group` all of its group; whoever follows a request learns of it."""
        self._signal(signal.SIGKILL, group=group)

    async def stop(self, *, group: bool = False) -> None:
        """Kills, waits for the end and closes what belongs to the kernel; nobody may follow a request any more."""
        self.kill(group=group)
        await asyncio.to_thread(self._process.wait)
        if self._stderr < 0:
            return

        asyncio.get_running_loop().remove_reader(self._stderr)
        os.close(self._stderr)
        self._stderr = -1
        self._client.stop_channels()
        await self._manager.cleanup_resources()

    def _signal(self, number: signal.Signals, *, group: bool) -> None:
        # The kernel leads its own session, so its pid is its group's. The group may outlive it.
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    async def limit_memory(self, limit: int | None) -> None:
        """Sets what the kernel may fill, in bytes, by what it has mapped now; None leaves it without a limit."""
        if limit is not None:
            await self._arrange(f"__import__('_sandbox').limit_memory({limit})")

    async def warm_up(self) -> None:
        """Imports what most code imports."""
        await self._arrange("__import__('_sandbox').warm_up()")

    async def _become_ready(self) -> None:
        self._client.start_channels(stdin=False, hb=False, control=False)
        for _ in range(START_TICKS):
            if self.exit_code is not None:
                raise self.died

            # Until the kernel knows of the subscription, messages pass the guest by: ask until one comes through.
            asked = self._client.kernel_info()
            with contextlib.suppress(Empty):
                while (await self._client.get_iopub_msg(TICK))["parent_header"].get("msg_id") != asked:
                    pass
                break
        else:
            msg = "no answer from it"
            raise KernelDiedError(msg)

        source = IN_KERNEL.read_text(encoding="utf-8")
        await self._arrange(LOAD.format(source=source, file=str(IN_KERNEL)))

    async def _arrange(self, code: str) -> None:
        reply = await self.request(code, silent=True)
        if reply["status"] != "ok":
            msg = f"its preparation failed: {reply.get('ename')}: {reply.get('evalue')}"
            raise KernelDiedError(msg)

    async def _next(self, receive: Callable[[float], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        dead = False
        while True:
            try:
                return await receive(TICK)
            except Empty:
                # What it sent before it died may have come in since; so look once more.
                if dead:
                    self._request = None
                    raise self.died from None
                dead = self.exit_code is not None

    def _read_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._stderr, 1 << 16)
            if not data:
                asyncio.get_running_loop().remove_reader(self._stderr)
            self._tail = (self._tail + data)[-STDERR_TAIL:]
