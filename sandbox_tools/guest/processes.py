"""Commands and terminals inside the sandbox: how they start, who reads along, and how their end is told."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import termios
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.guest.kernels import TICK
from sandbox_tools.guest.spawn import READ_SIZE, Command, InputError, Output, spawn

REST = 0.004
"""Seconds between two looks at a process's output. What it writes in that time goes out as one piece, at the cost of
one; were each of its writes passed on by itself, a busy process would cost many times as much."""

QUEUED = 512 << 10
"""Bytes, as they are sent, that wait for a reader before the process has to wait for it as well."""

SETTLING = (0.02, 0.02, 0.04, 0.1, 0.2, 0.4)
"""Seconds between the looks at whether a new size has stayed; a resize is answered about the first of them."""

RETENTION = 30.0
"""Seconds, of the time that the sandbox is awake, in which the end of a process can still be asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a process ended, in the words of Go's `os.ProcessState`, which clients know from envd."""

    exit_code: int
    """-1: a signal ended it."""
    exited: bool
    status: str

    @classmethod
    def of(cls, how: os.waitid_result) -> End:
        """From what the kernel says."""
        if how.si_code == os.CLD_EXITED:
            return cls(exit_code=how.si_status, exited=True, status=f"exit status {how.si_status}")

        status = f"signal: {_signal_name(how.si_status)}" + " (core dumped)" * (how.si_code == os.CLD_DUMPED)
        return cls(exit_code=-1, exited=False, status=status)


class Reader:
    """One who reads along: what was put in for it and not yet taken, and then the end."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._pieces: list[bytes] = []
        self._queued = 0
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether nothing should be put in for now."""
        return self._queued >= QUEUED

    def put(self, piece: bytes) -> None:
        """Adds envelopes."""
        self._pieces.append(piece)
        self._queued += len(piece)
        self.wake()

    def wake(self) -> None:
        """Makes it look at what there is."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> bytes | None:
        """All that is there, as soon as there is something. None: that was all, the process has ended."""
        while not self._pieces:
            if self._process.end is not None:
                return None
            # Not an `asyncio.Event`: it asks the kernel at every wait which process this is, and in here that is slow.
            self._waiting = self._loop.create_future()
            await self._waiting

        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._queued = 0
        self._process.resume()
        return data


class Process:
    """A running command; made by `Processes.start`.

    It waits for the slowest of its readers. While there is none, its output is thrown away, so that it never waits for
    nobody. What it left running in the background may hold its pipes: its end is told all the same.
    """

    def __init__(self, command: Command, env: Mapping[str, str]) -> None:
        """Starts it; raises as `spawn` does."""
        self.command = command
        self.end: End | None = None
        self.timed_out = False
        self._readers: set[Reader] = set()
        self._how: os.waitid_result | None = None
        self._popen, self.input, self._outputs = spawn(command, env)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._former_sizes: set[tuple[int, int]] = set()
        self.ended = asyncio.Event()
        for output in self._outputs:
            self._watch(output, True)  # and not read at once: its first reader comes after this
        try:
            threading.Thread(target=self._await_exit, name=f"wait-{self.pid}", daemon=True).start()
        except RuntimeError as error:
            self.signal(signal.SIGKILL)
            self._exited(os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT))
            raise OSError(errno.EAGAIN, "no thread can be started that waits for its end") from error

    @property
    def pid(self) -> int:
        """Its id; also that of its group and session, which it leads."""
        return self._popen.pid

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone, as envd does; SIGKILL to its whole group, which nobody could tidy up."""
        # The process is not yet reaped as long as there is no `_how`, so that its id can be nobody else's.
        if self._how is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number is signal.SIGKILL else os.kill)(self.pid, number)

    def limit(self, seconds: float) -> None:
        """Kills it after that time."""
        self._timer = asyncio.create_task(self._expire(seconds))

    async def resize(self, rows: int, columns: int) -> None:
        """Gives its terminal another size, and sees to it for a while that it keeps it.

        Raises:
            InputError: It has no terminal.
        """
        if self.command.size is None or self._outputs[0].fd < 0:
            msg = "the process has no terminal"
            raise InputError(msg)

        self._former_sizes.add(termios.tcgetwinsize(self._outputs[0].fd))
        self._former_sizes.discard((rows, columns))
        self._set_size(rows, columns)
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.create_task(self._settle(rows, columns))
        await asyncio.sleep(SETTLING[0])

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reader]:
        """A reader of what comes from now on."""
        reader = Reader(self)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            self.resume()

    def resume(self) -> None:
        """Goes on with its output, unless a reader has enough of it for now."""
        if self._slow or self.end is not None:
            return

        if self._how is not None:
            self._drain()
        else:
            for output in self._outputs:
                if output.fd >= 0 and not output.watched and not output.resting:
                    self._look(output)

    @property
    def _slow(self) -> bool:
        return any(reader.full for reader in self._readers)

    def _look(self, output: Output) -> None:
        """Reads; goes on when something comes, after a rest, or when it is resumed."""
        length = 0 if self._slow else self._pass_on(output)
        if output.fd < 0:
            return

        self._watch(output, not length and not self._slow)
        if length:
            output.resting = True
            more = length == READ_SIZE and bool(self._readers)
            self._loop.call_later(0 if more else REST, self._look_again, output)

    def _look_again(self, output: Output) -> None:
        output.resting = False
        if self.end is None:
            self.resume()
        elif output.fd >= 0:
            self._look(output)

    def _watch(self, output: Output, wanted: bool) -> None:
        if wanted and not output.watched:
            self._loop.add_reader(output.fd, self._look, output)
        elif output.watched and not wanted:
            self._loop.remove_reader(output.fd)
        output.watched = wanted

    def _pass_on(self, output: Output) -> int:
        """Reads once, for all readers; how many bytes that were."""
        data = output.read()
        if not data:
            if data is not None:
                output.close()
            return 0

        if self._readers:
            piece = output.envelopes(data)
            for reader in self._readers:
                reader.put(piece)
        output.left -= len(data) * (self._how is not None)
        return len(data)

    def _signal_session(self, number: int) -> None:
        """Does what a terminal's kernel does for its foreground; gVisor's does not, and does not say who that is."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                session = path.read_text(errors="replace").rpartition(")")[2].split()[3]
                if int(session) == self.pid:
                    os.kill(int(path.parent.name), number)

    def _await_exit(self) -> None:
        # It stays a zombie until the loop has heard of it: no signal can go to another process of the same id.
        how = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop has been closed: the guest is ending
            self._loop.call_soon_threadsafe(self._exited, how)

    def _exited(self, how: os.waitid_result | None) -> None:
        assert how is not None  # only a caller that does not want to wait is told nothing
        self._how = how
        # A shell that ends by itself leaves nobody in the foreground.
        if self.command.size is not None and how.si_code != os.CLD_EXITED:
            self._signal_session(signal.SIGHUP)
        self._popen.wait()
        self.resume()

    def _drain(self) -> None:
        for output in self._outputs:
            while not output.drained:
                if self._slow:
                    return
                output.drained = output.fd < 0 or not self._pass_on(output) or output.left <= 0
        self._finish()

    def _finish(self) -> None:
        assert self._how is not None
        self.end = End.of(self._how)
        self.ended.set()
        for task in (self._timer, self._settling):
            if task is not None:
                task.cancel()
        if self.input is not None:
            self.input.close()
        for reader in self._readers:
            reader.wake()
        self._readers = set()
        for output in self._outputs:
            if self.command.size is not None:
                output.close()
            elif output.fd >= 0 and not output.resting:
                # Who writes on in the background would be killed by a closed pipe.
                self._watch(output, True)

    def _set_size(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self._outputs[0].fd, (rows, columns))
        self._signal_session(signal.SIGWINCH)

    async def _settle(self, rows: int, columns: int) -> None:
        """Sets the size again when a former one comes back.

        Readline, when it takes the terminal over, reads its size and writes it back: what was set in between is lost.
        """
        for seconds in SETTLING:
            await asyncio.sleep(seconds)
            fd = self._outputs[0].fd
            if fd < 0:
                return
            if termios.tcgetwinsize(fd) in self._former_sizes:
                self._set_size(rows, columns)
        self._former_sizes.clear()

    async def _expire(self, seconds: float) -> None:
        await awake(seconds)
        self.timed_out = True
        self.signal(signal.SIGKILL)


class Processes:
    """The processes of a sandbox, by id and tag."""

    def __init__(self) -> None:
        self._processes: dict[int, Process] = {}
        self._forgetting: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Process]:
        """Those that run."""
        return iter([process for process in self._processes.values() if process.end is None])

    def start(self, command: Command, env_vars: Mapping[str, str]) -> Process:
        """Starts one; raises as `Process` does.

        Args:
            env_vars: The variables of the whole sandbox.
        """
        env = command.account.environment()
        # Scripts have no results to draw into, and their Python need not have that module.
        env.pop("MPLBACKEND", None)
        process = Process(command, {**env, **env_vars, **command.envs})
        # An older one of the same id has ended: its end is nobody's any more.
        self._processes.pop(process.pid, None)
        self._processes[process.pid] = process
        task = asyncio.create_task(self._forget(process))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)
        return process

    def get(self, pid: int) -> Process | None:
        """One that runs or ended a short while ago. None: there is none."""
        return self._processes.get(pid)

    def tagged(self, tag: str) -> Process | None:
        """The last one that was started with that tag, as `get` does."""
        return next((each for each in reversed(self._processes.values()) if each.command.tag == tag), None)

    def kill(self) -> None:
        """Kills all, with their groups."""
        for process in self:
            process.signal(signal.SIGKILL)

    async def _forget(self, process: Process) -> None:
        await process.ended.wait()
        await awake(RETENTION)
        if self._processes.get(process.pid) is process:
            del self._processes[process.pid]


async def awake(seconds: float) -> None:
    """Sleeps for a time in which the sandbox is awake; at most two ticks of a pause are counted."""
    loop = asyncio.get_running_loop()
    while seconds > 0:
        began = loop.time()
        await asyncio.sleep(min(seconds, TICK))
        seconds -= min(loop.time() - began, 2 * TICK)


def _signal_name(number: int) -> str:
    """As Go prints it: like C, in lower case, but for what has no name there."""
    text = signal.strsignal(number) if number < signal.SIGRTMIN else None
    if text is None:
        return f"signal {number}"

    return text[0].lower() + text[1:] if text[1:2].islower() else text
