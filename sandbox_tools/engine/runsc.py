"""gVisor behind the runtime seam: one `runsc` call a verb."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
from pathlib import Path
from subprocess import Popen

from sandbox_tools.engine import bounds, groups, usage
from sandbox_tools.engine.brisk import Brisk
from sandbox_tools.engine.building.install import version_of
from sandbox_tools.engine.gate import Gate, end_if_shut
from sandbox_tools.engine.runtime import Container, ContainerState, Usage
from sandbox_tools.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

# Verbs that write or read an image: 4 s per GB is the slowest service's figure, 64 GB the largest machine's.
_VERB_SECONDS = 300.0

# Verbs that only ask or signal; milliseconds, unless what they ask stands still.
_ASK_SECONDS = 20.0

# The last release of which it is known that it writes each file of an image from its beginning to its end.
_LAST_IN_ORDER = 20240729

# Where any other writes, so that its files come whole.
_UNORDERED = "unordered"

# An ordinary user's calls run in a user namespace of their own, where `runsc` is root over that user's files only.
_AS_USER = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--")


class Runsc:
    """The `Runtime` that gVisor's `runsc` is.

    Args:
        binary: The `runsc` to ask about containers in general; each container names its own.
        state: Where `runsc` keeps its own records; one directory for all containers of an engine.
        platform: gVisor's way of intercepting system calls; `systrap` needs nothing of the machine.
    """

    def __init__(self, binary: Path, state: Path, *, platform: str = "systrap") -> None:
        self._binary = binary
        self._state = state
        self._platform = platform
        self._brisk = Brisk()
        self._deletions: set[asyncio.Task[None]] = set()

    async def create(self, container: Container) -> None:
        """Boot from the bundle; the guest's own log goes to `guest.log` beside it."""
        with (container.directory / "guest.log").open("wb") as log:
            await self._start(container, "run", stderr=log.fileno())

    async def restore(self, container: Container, image: Path) -> None:
        """Bring back from an image; whatever an ended guest logs is dropped, as it could fill the disk."""
        await self._start(container, "restore", f"--image-path={image}", stderr=asyncio.subprocess.DEVNULL)

    async def checkpoint(self, container: Container, image: Path, *, after: asyncio.Future[None] | None = None) -> None:
        """Write an image; without `--leave-running` a full disk would kill the container.

        A `runsc` takes as long to start as to freeze a container: this one starts before it may begin.
        """
        into = image if await asyncio.to_thread(_in_order, container.binary) else image / _UNORDERED
        into.mkdir(exist_ok=True)
        arguments = (f"--image-path={into}", "--compression=none", "--leave-running", container.id)
        with Gate(container.directory) as gate:
            argv = [*self._prefix(container, gate.path), "checkpoint", *arguments]
            process = await self._brisk.start(argv)
            try:
                if after is not None:
                    await asyncio.wait({after})
                    after.result()
                _signal(container, signal.SIGCONT)  # its tasks stand still, and gVisor has to write
                self._bound(container, None, None)  # the image is no file of the sandbox's
            except BaseException:
                await self._brisk.kill(process)
                raise
            gate.open()
            await self._end(process, argv, "checkpoint", container, _VERB_SECONDS)
        if into != image:
            for file in into.iterdir():
                file.rename(image / file.name)
            into.rmdir()

    async def bound(self, container: Container) -> None:
        """As its bundle says; its memory, where there are control groups."""
        self._bound(container, container.memory_limit(), bounds.file_limit(container.bundle))

    def _bound(self, container: Container, memory: int | None, file: int | None) -> None:
        pid = _sandbox_pid(container)
        if pid is not None:
            groups.limit_memory(pid, memory)
            bounds.limit_files(pid, file)

    async def freeze(self, container: Container) -> None:
        """Stop every task, then gVisor itself, which takes some percent of a core although nothing runs on it."""
        await self._turn(container, "pause", "frozen")
        _signal(container, signal.SIGSTOP)

    async def thaw(self, container: Container) -> None:
        """Let gVisor and every task go on."""
        await self._turn(container, "resume", "running")

    async def _turn(self, container: Container, verb: str, into: ContainerState) -> None:
        _signal(container, signal.SIGCONT)
        try:
            await self._ask(container, verb)
        except EngineError:
            # It is refused as well where there is nothing to do. To ask first would cost as much as the verb.
            if await self.state(container) != into:
                raise

    async def state(self, container: Container) -> ContainerState:
        """What `runsc` says of a container whose process lives; without one it is gone."""
        # `runsc` itself takes a process for alive that has ended and that the host's init has yet to reap.
        pid = _sandbox_pid(container)
        if pid is None:
            return "gone"
        # One that is stopped would not answer.
        if _stopped(pid):
            return "frozen"

        status = json.loads(await self._ask(container, "state"))["status"]
        states: dict[str, ContainerState] = {"running": "running", "paused": "frozen"}
        return states.get(status, "gone")

    async def kill(self, container: Container) -> None:
        """End the sandbox's process at once; `runsc` tidies its records afterwards, in its own time."""
        _signal(container, signal.SIGKILL)
        await self.wait(container)
        # It waits for the host's init to reap the process: a second or two that nobody needs to see.
        task = asyncio.create_task(self._delete(container))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def wait(self, container: Container) -> None:
        """Return when the sandbox's process has ended, by whatever cause."""
        pidfd = _sandbox_process(container)
        if pidfd is not None:
            try:
                await _readable(pidfd)
            finally:
                os.close(pidfd)

    def resident_bytes(self, container: Container) -> int:
        """RAM that the sandbox holds: its own memory, and what gVisor's processes need for themselves."""
        pid = _sandbox_pid(container)
        return 0 if pid is None else usage.memory(pid)

    def image_bytes(self, container: Container) -> int:
        """Read of the files that gVisor keeps its memory in."""
        pid = _sandbox_pid(container)
        return 0 if pid is None else usage.image(pid, container)

    def usage(self, container: Container) -> Usage | None:
        """Read of the host's `/proc` and control groups; reading the memory of a large sandbox takes milliseconds."""
        pid = _sandbox_pid(container)
        return None if pid is None else usage.measure(pid, container)

    def known(self) -> list[str]:
        """The ids of all containers that `runsc` has records of, dead ones included.

        Read from the records' names: `runsc list` asks each container, and one that stands still would stop it.
        """
        return [record.name.partition("_sandbox:")[0] for record in self._state.glob("*_sandbox:*.state")]

    async def settle(self) -> None:
        """Wait for verbs that an engine which died has left running: they would bring up what nobody asks for now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_VERB_SECONDS):
                while self._verbs_under_way():  # noqa: ASYNC110 - other processes' children have no event
                    await asyncio.sleep(0.05)

    def _verbs_under_way(self) -> bool:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                argv = process.read_text(errors="replace").split("\0")
                # `boot` and `gofer` are the containers themselves.
                if f"--root={self._state}" in argv and not {"boot", "gofer"} & set(argv):
                    end_if_shut(int(process.parent.name))
                    return True
        return False

    async def aclose(self) -> None:
        """Wait until the records of killed containers are gone."""
        await asyncio.gather(*self._deletions)

    async def _start(self, container: Container, verb: str, *options: str, stderr: int) -> None:
        container.filestore.mkdir(exist_ok=True)
        # The container inherits these three; its stdin and stdout are the tunnel.
        with container.pipes.handed() as (stdin, stdout):
            await self._call(
                container,
                verb,
                "--detach",
                f"--bundle={container.bundle}",
                f"--pid-file={_pid_file(container)}",
                *options,
                container.id,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        if (pid := _sandbox_pid(container)) is not None:
            bounds.limit_files(pid, bounds.file_limit(container.bundle))

    async def _delete(self, container: Container) -> None:
        # Not as one of the container's own verbs: its directory, where they log, may go at any moment.
        try:
            await self._call(None, "delete", "-force", container.id)
        except EngineError as error:
            # Deleting by force what never came to be is no error; anything else leaves a control group behind.
            log.warning("The records of container %s could not be removed: %s", container.id, error)

    async def _ask(self, container: Container, verb: str) -> str:
        """What a small verb printed."""
        argv = [*self._prefix(container), verb, container.id]
        return await self._end(await self._brisk.start(argv), argv, verb, container, _ASK_SECONDS)

    async def _end(
        self, process: Popen[bytes], argv: list[str], verb: str, container: Container, seconds: float
    ) -> str:
        try:
            code, out, err = await self._brisk.end(process, seconds)
        except TimeoutError:
            raise _late(argv, verb, seconds) from None
        return self._said(argv, verb, container, code, out, err)

    async def _call(
        self,
        container: Container | None,
        verb: str,
        *arguments: str,
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int = asyncio.subprocess.PIPE,
        stderr: int = asyncio.subprocess.PIPE,
    ) -> None:
        """A verb that brings up a container, or ends one, with whatever children that has."""
        argv = [*self._prefix(container), verb, *arguments]
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            async with asyncio.timeout(_VERB_SECONDS):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise _late(argv, verb, _VERB_SECONDS) from None
        self._said(argv, verb, container, await process.wait(), out, err)

    def _said(
        self, argv: list[str], verb: str, container: Container | None, code: int, out: bytes | None, err: bytes | None
    ) -> str:
        """What it printed, if it ended well."""
        if code:
            said = (err or b"").decode(errors="replace").strip() or self._logged(container)
            msg = f"`runsc {verb}` failed with exit code {code}: {said[-600:] or 'it said nothing'}"
            raise EngineError(msg, argv=argv, exit_code=code, stderr=said[-4000:], op=verb)
        return (out or b"").decode()

    def _prefix(self, container: Container | None, log_file: Path | None = None) -> list[str]:
        flags = [
            str(self._binary if container is None else container.binary),
            f"--root={self._state}",
            "--network=none",
            f"--platform={self._platform}",
        ]
        if container is not None:
            flags += [
                f"--overlay2=root:dir={container.filestore}",
                f"--log={log_file or _log_file(container)}",
                "--log-format=text",
            ]
        if os.geteuid() != 0:
            return [*_AS_USER, *flags, "--ignore-cgroups"]
        return flags

    def _logged(self, container: Container | None) -> str:
        """The end of what `runsc` logged, for the verbs whose standard error belongs to the container."""
        if container is None or not _log_file(container).exists():
            return ""
        return "\n".join(_log_file(container).read_text(errors="replace").splitlines()[-3:])


def _late(argv: list[str], verb: str, seconds: float) -> EngineError:
    msg = f"`runsc {verb}` did not end within {seconds:.0f} s and was stopped."
    return EngineError(msg, argv=argv, op=verb)


def _pid_file(container: Container) -> Path:
    return container.directory / "pid"


def _log_file(container: Container) -> Path:
    return container.directory / "runsc.log"


@functools.cache
def _in_order(binary: Path) -> bool:
    try:
        return version_of(binary) <= _LAST_IN_ORDER
    except ConfigError:
        return False


def _sandbox_pid(container: Container) -> int | None:
    """The container's host process; None if it is gone.

    The number in the pid file may have been given to another process since: only one that carries the container's id
    on its command line is it.
    """
    with contextlib.suppress(OSError, ValueError):
        pid = int(_pid_file(container).read_text())
        if container.id in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"):
            return pid
    return None


def _stopped(pid: int) -> bool:
    """Whether a process stands still by a signal: field 3 of proc(5), after the name, which may hold blanks."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    return False


def _signal(container: Container, number: signal.Signals) -> None:
    """Send a signal to the container's host process; nothing, where it is gone."""
    pidfd = _sandbox_process(container)
    if pidfd is not None:
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _sandbox_process(container: Container) -> int | None:
    """A pidfd of the container's host process, which the caller closes; None if it is gone."""
    pid = _sandbox_pid(container)
    if pid is None:
        return None

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None

    # Opened first and checked again: the number cannot change hands under an open pidfd.
    if _sandbox_pid(container) != pid:
        os.close(pidfd)
        return None
    return pidfd


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
