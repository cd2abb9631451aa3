"""One Jupyter kernel: its process, its sockets, and the request it is working on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jupyter_client.connect import write_connection_file
from zmq.constants import SocketType

from sandbox_tools.guest.channels import Channel, Message
from sandbox_tools.guest.languages import CONNECTION_FILE, Language
from sandbox_tools.guest.scripts import FENCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandbox_tools.guest.accounts import Account

logger = logging.getLogger(__name__)

TICK = 0.25
"""Seconds of silence after which a kernel's process is looked at.

Waits are counted in ticks, never measured against a clock: a sandbox may sleep for days between two lines of this
file, and a deadline set before would be over when it wakes. A nap costs one tick at most.
"""

UNANSWERED = int(5 / TICK)
"""Ticks after which a kernel that says it is idle has no reply to give: it sends that first."""

START_TICKS = 480
"""How long a kernel may take to answer for the first time."""

STDERR_TAIL = 4096  # bytes

LATE = {"stream", "display_data", "execute_result"}
"""Output that also counts when it comes under an earlier request's name: threads and timers go on between requests."""


Deliver = Callable[[Message], Awaitable[None]]
"""Takes output; it may take its time."""


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

    def __init__(
        self, language: Language, files: Path, connection: Any, process: subprocess.Popen[bytes], stderr: int
    ) -> None:
        self._language = language
        self._files = files
        self._shell = _channel(SocketType.DEALER, "shell", connection)
        self._iopub = _channel(SocketType.SUB, "iopub", connection)
        self._control = _channel(SocketType.DEALER, "control", connection) if language.interrupt == "message" else None
        self._process = process
        self._stderr = stderr
        self._tail = b""
        self._request: str | None = None
        self._reply: dict[str, Any] | None = None
        self._silent = False
        self._idle = False
        self._fence = False
        """Whether a fence is still to come."""

    @classmethod
    async def start(cls, language: Language, launch: Launch, *, cwd: Path, env: Mapping[str, str]) -> Self:
        """Starts a kernel and waits until it has answered.

        Raises:
            KernelDiedError: It ended, or never answered.
            OSError: It could not be started, for instance because `cwd` is not there.
        """
        files = launch.directory / secrets.token_hex(4)
        # Whoever can reach sockets in the file system can read the key as well: signing would only cost time.
        where: dict[str, Any] = {"ip": f"{files}-ipc"} if language.transport == "ipc" else {"key": _key()}
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            path, connection = write_connection_file(f"{files}.json", transport=language.transport, **where)
            launch.account.own(Path(path))
            process = _spawn(language, launch, path, cwd=cwd, env=env, stderr=writing)
        except BaseException:
            os.close(reading)
            _remove(files)
            raise
        finally:
            os.close(writing)

        kernel = cls(language, files, connection, process, reading)
        asyncio.get_running_loop().add_reader(reading, kernel._read_stderr)
        try:
            await kernel._become_ready()
            if language.script and language.script.prelude:
                await kernel._arrange(language.script.prelude)
            await kernel.limit_memory(launch.memory_limit)
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

        # SIGTRAP is how V8 ends when its heap is full.
        hint = ", often for want of memory" if -code in (signal.SIGKILL, signal.SIGTRAP) else ""
        return KernelDiedError(f"signal {-code}, {signal.Signals(-code).name}{hint}")

    @property
    def busy(self) -> bool:
        """Whether a request is under way, also one that nobody follows any more."""
        return self._request is not None

    async def request(
        self,
        code: str,
        *,
        silent: bool = False,
        kept: bool = True,
        fence: bool = False,
        deliver: Deliver | None = None,
    ) -> dict[str, Any]:
        """Runs code and returns the kernel's reply; output goes to `deliver`, which may take its time.

        When this is cancelled the code goes on: call `follow` to learn when it is over.

        Args:
            silent: Leave no trace in the counter and the history, and deliver only what others print.
            kept: Count it, and keep it in the history.
            fence: The code sends a `FENCE`, which is to be waited for.

        Raises:
            KernelDiedError: The process ended; all output that it sent before has been delivered.
        """
        self._reply, self._silent, self._idle, self._fence = None, silent, False, fence
        self._request = self._shell.send(
            "execute_request",
            {
                "code": code,
                "silent": silent,
                "store_history": kept and not silent,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": False,
            },
        )
        return await self.follow(deliver)

    async def follow(self, deliver: Deliver | None = None) -> dict[str, Any]:
        """Waits until the request under way is over; returns and raises as `request` does."""
        while True:
            if self._idle and self._reply is None:
                message = await self._next(self._shell, UNANSWERED)
                if message is None:
                    # ipykernel is interrupted between the end of the code and its reply as well: then there is none.
                    self._reply = {"status": "error", "ename": "KeyboardInterrupt", "evalue": ""}
                elif message.parent == self._request:
                    self._reply = message.content
            # Code that failed may not have come to its fence.
            elif not self._idle or (self._fence and self._reply and self._reply["status"] == "ok"):
                if news := await self._next(self._iopub):
                    await self._heed(news, deliver)
            else:
                self._request = None
                assert self._reply is not None
                return self._reply

    async def _heed(self, message: Message, deliver: Deliver | None) -> None:
        kind, ours = message.kind, message.parent == self._request
        if kind == FENCE:
            self._fence = False
        elif ours and kind == "status":
            self._idle = message.content["execution_state"] == "idle"
        elif deliver and (kind in LATE or (ours and not self._silent)):
            await deliver(message)

    def discard(self, throw_away: bool) -> None:
        """Whether what background threads print is thrown away, because nobody listens."""
        self._iopub.discard(throw_away)

    def interrupt(self, *, group: bool) -> None:
        """Interrupts the code, as SIGINT does where the kernel knows that.

        Args:
            group: Signal also every process of the kernel's group. That reaches a child which the kernel waits for
                deafly, as in `os.system`, but also what earlier code started in the background.
        """
        if self._control:
            self._control.send("interrupt_request", {})
        else:
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
        for channel in (self._shell, self._iopub, self._control):
            if channel:
                channel.close()
        _remove(self._files)

    def _signal(self, number: signal.Signals, *, group: bool) -> None:
        # The kernel leads its own session, so its pid is its group's. The group may outlive it.
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    async def limit_memory(self, limit: int | None) -> None:
        """Sets what the kernel may fill, in bytes, by what it has mapped now; None leaves it without a limit."""
        if limit is not None and self._language.script:
            await self._arrange(self._language.script.limit_memory(limit))

    async def warm_up(self) -> None:
        """Imports what most Python code imports."""
        await self._arrange("__import__('_sandbox').warm_up()")

    async def touch(self) -> None:
        """Touches the memory that an execution needs, its output included; leaves no trace."""

        async def drop(_: Message) -> None: ...

        await self.request("__import__('_sandbox').touch()", kept=False, deliver=drop)

    async def _become_ready(self) -> None:
        for _ in range(START_TICKS):
            if self.exit_code is not None:
                raise self.died

            # Until the kernel knows of the subscription, messages pass the guest by: ask until one comes through.
            asked = self._shell.send("kernel_info_request", {})
            while message := await self._iopub.receive(TICK):
                if message.parent == asked:
                    return

        msg = "no answer from it"
        raise KernelDiedError(msg)

    async def _arrange(self, code: str) -> None:
        reply = await self.request(code, silent=True)
        if reply["status"] != "ok":
            msg = f"its preparation failed: {reply.get('ename')}: {reply.get('evalue')}"
            raise KernelDiedError(msg)

    async def _next(self, channel: Channel, ticks: float = math.inf) -> Message | None:
        """The next message. None: there was none for so many ticks."""
        dead = False
        while ticks > 0:
            message = await channel.receive(TICK)
            if message:
                return message

            ticks -= 1
            # What it sent before it died may have come in since; so look once more.
            if dead:
                self._request = None
                raise self.died
            dead = self.exit_code is not None
        return None

    def _read_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._stderr, 1 << 16)
            if not data:
                asyncio.get_running_loop().remove_reader(self._stderr)
            self._tail = (self._tail + data)[-STDERR_TAIL:]


def _channel(kind: SocketType, name: str, connection: Mapping[str, Any]) -> Channel:
    between = "-" if connection["transport"] == "ipc" else ":"
    address = f"{connection['transport']}://{connection['ip']}{between}{connection[f'{name}_port']}"
    return Channel(kind, address, connection["key"].encode())


def _key() -> bytes:
    # Anybody inside can connect to a port of the loopback.
    return secrets.token_hex(16).encode()


def _spawn(
    language: Language, launch: Launch, connection_file: str, *, cwd: Path, env: Mapping[str, str], stderr: int
) -> subprocess.Popen[bytes]:
    account, limit = launch.account, launch.memory_limit
    switch: dict[str, Any] = {}
    if account.uid is not None:
        switch = {"user": account.uid, "group": account.gid, "extra_groups": account.groups}
    process = subprocess.Popen(
        [connection_file if word == CONNECTION_FILE else word for word in language.command],
        # Standard output of the guest may be the tunnel: nobody else may write to it.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        cwd=str(cwd),
        start_new_session=True,
        env={
            **account.environment(),
            **language.env,
            "IPYTHONDIR": str(launch.directory),  # else it litters the user's home
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else a debugger that is installed warns in the first output
            # In a sandbox nothing outlives the guest; elsewhere kernels look each second whether it is still there.
            **({"JPY_PARENT_PID": str(os.getpid())} if account.uid is None else {}),
            **(language.heap_limit(limit) if limit else {}),
            **env,
        },
        **switch,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(language.program.encode())
    return process


def _remove(files: Path) -> None:
    for path in files.parent.glob(f"{files.name}*"):
        path.unlink(missing_ok=True)
