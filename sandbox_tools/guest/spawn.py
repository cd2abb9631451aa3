"""How a process of the sandbox starts, and the files that lead into it and out of it."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.guest.accounts import Account
from sandbox_tools.guest.envelopes import HEADER

PIPE_SIZE = 1 << 20
"""Bytes that a pipe holds. The kernel's own 64 KiB make a writer wait for its reader all the time."""

SETPRIV = "/usr/bin/setpriv"
"""Debian's, from a package that no Debian is without."""

CHUNKS = {"stdout": 32 << 10, "stderr": 32 << 10, "pty": 16 << 10}
"""Bytes of output in one event at most, as envd sends them."""

READ_SIZE = 512 << 10

_buffer = memoryview(bytearray(READ_SIZE))
"""What is read goes here first, and is copied on before anything else is read."""


class InputError(Exception):
    """Raised for input that cannot be given to the process; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What to run."""

    cmd: str
    args: tuple[str, ...]
    envs: Mapping[str, str]
    """The caller's own, on top of those of the account and the sandbox."""
    cwd: Path
    account: Account
    tag: str | None = None
    """A name that the caller gave it."""
    stdin: bool = True
    """False: it reads from /dev/null."""
    size: tuple[int, int] | None = None
    """Rows and columns of its terminal. None: it has pipes, and no terminal."""


class Input:
    """The way into a process; writes go in whole and in order."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._turn = asyncio.Lock()
        self._writable = asyncio.Event()
        os.set_blocking(fd, False)

    async def write(self, data: bytes) -> None:
        """Waits until the process, or the buffer before it, has taken all of it.

        Raises:
            InputError: It is closed, or the process reads no more.
        """
        async with self._turn:
            left = memoryview(data)
            while left:
                if self._fd < 0:
                    msg = "it has been closed, or the process has ended"
                    raise InputError(msg)
                try:
                    left = left[os.write(self._fd, left) :]
                except BlockingIOError:
                    await self._until_writable()
                except OSError as error:
                    raise InputError(os.strerror(error.errno or 0).lower()) from error

    async def finish(self) -> None:
        """Closes it once all has been written that is on its way."""
        async with self._turn:
            self.close()

    def close(self) -> None:
        """Closes it now; safe to call twice."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._writable.set()

    async def _until_writable(self) -> None:
        loop = asyncio.get_running_loop()
        self._writable.clear()
        loop.add_writer(self._fd, self._writable.set)
        try:
            await self._writable.wait()
        finally:
            if self._fd >= 0:
                loop.remove_writer(self._fd)


class Output:
    """The way out of a process: one of its pipes, or its terminal."""

    def __init__(self, kind: str, fd: int) -> None:
        self.fd = fd
        self.drained = False
        """Whether all has been read that the process wrote before it ended."""
        self.left = PIPE_SIZE
        """Bytes to read at most after the end. What the process wrote is not more; others may write on for ever."""
        self.watched = False
        """Whether the loop tells of what comes."""
        self.resting = False
        """Whether nothing is to be read for a moment, so that more comes at once."""
        self._terminal = kind == "pty"
        self._chunk = CHUNKS[kind]
        self._prefix = b'{"event":{"data":{"%s":"' % kind.encode()
        os.set_blocking(fd, False)

    def read(self) -> memoryview | None:
        """What is there, until the next call. Empty: nobody can write any more. None: nothing is there now."""
        length = 0
        try:
            while more := os.readv(self.fd, [_buffer[length:]]):
                length += more
                # A terminal gives a page at a time, a pipe all that it has.
                if not self._terminal or length == READ_SIZE:
                    break
        except BlockingIOError:
            return _buffer[:length] or None
        except OSError:  # a terminal says so that it has been closed
            pass
        return _buffer[:length]

    def envelopes(self, data: memoryview) -> bytes:
        """Output as events in their envelopes. This is done by hand because it is done for every byte."""
        parts: list[bytes] = []
        for at in range(0, len(data), self._chunk):
            text = binascii.b2a_base64(data[at : at + self._chunk], newline=False)
            parts += (HEADER.pack(0, len(self._prefix) + len(text) + 4), self._prefix, text, b'"}}}')
        return b"".join(parts)

    def close(self) -> None:
        """Closes it; safe to call twice."""
        if self.fd >= 0:
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1


def spawn(command: Command, env: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], Input | None, list[Output]]:
    """Starts it: the process, the way into it if it has one, and the ways out of it.

    Raises:
        OSError: It could not be started.
        ValueError: No process can have such a name, argument or variable.
    """
    line = _command_line(command, env)
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        if command.size is None:
            files, into, out = _pipes(ours, theirs, stdin=command.stdin)
        else:
            files, into, out = _terminal(ours, theirs, command.size, command.account)
        popen = subprocess.Popen(
            line,
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            cwd=command.cwd,
            env=env,
            start_new_session=True,
            # There is no other way to it; the one call in there takes no lock that another thread could hold.
            preexec_fn=None if command.size is None else _take_terminal,
        )
        ours.pop_all()
    return popen, None if into is None else Input(into), [Output(kind, fd) for kind, fd in out.items()]


def _command_line(command: Command, env: Mapping[str, str]) -> list[str]:
    """What to execute; it becomes the user on its way to the program.

    Python can switch users as well, but then it makes a copy of the guest (fork) where it else only borrows it (vfork).
    Under gVisor that takes ten times as long, and nobody else is served meanwhile.
    """
    account, me = command.account, os.geteuid()
    line = [command.cmd, *command.args]
    if account.uid is None or account.uid == me:
        return line
    if me != 0:
        raise PermissionError(errno.EPERM, f"only root can run it as {account.name!r}")

    # Said here, because afterwards it would be an ordinary exit code.
    program = shutil.which(command.cmd if "/" not in command.cmd else command.cwd / command.cmd, path=env.get("PATH"))
    if program is None:
        missing = "/" not in command.cmd or not (command.cwd / command.cmd).exists()
        code = errno.ENOENT if missing else errno.EACCES
        raise OSError(code, os.strerror(code))

    groups = ",".join(map(str, account.groups))
    switch = [f"--reuid={account.uid}", f"--regid={account.gid}", f"--groups={groups}" if groups else "--clear-groups"]
    return [SETPRIV, *switch, "--", *line]


Ends = tuple[list[int], int | None, dict[str, int]]
"""What becomes a process's standard files; then our way in, and our ways out of it."""


def _pipes(ours: contextlib.ExitStack, theirs: contextlib.ExitStack, *, stdin: bool) -> Ends:
    def pipe(mine: int) -> tuple[int, int]:
        ends = os.pipe()
        ours.callback(os.close, ends[mine])
        theirs.callback(os.close, ends[1 - mine])
        return ends

    into = None
    if stdin:
        reading, into = pipe(1)
    else:
        reading = os.open(os.devnull, os.O_RDONLY)
        theirs.callback(os.close, reading)
    out, err = pipe(0), pipe(0)
    for fd, _ in (out, err):
        with contextlib.suppress(OSError):  # a user may only have so many pages in pipes; small ones do as well
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return [reading, out[1], err[1]], into, {"stdout": out[0], "stderr": err[0]}


def _terminal(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack, size: tuple[int, int], account: Account
) -> Ends:
    master, slave = os.openpty()
    ours.callback(os.close, master)
    theirs.callback(os.close, slave)
    into = os.dup(master)
    ours.callback(os.close, into)
    termios.tcsetwinsize(slave, size)
    with contextlib.suppress(OSError):  # who may not give it away uses what is open already
        account.own(slave)
    return [slave] * 3, into, {"pty": master}


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
