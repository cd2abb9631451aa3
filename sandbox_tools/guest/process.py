"""envd's `process.Process` service: what callers ask of processes, and the events that they get of them."""

from __future__ import annotations

import base64
import errno
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeVar

from sandbox_tools.guest.accounts import BadPathError, resolve
from sandbox_tools.guest.connect import Call, RpcError, client_stream, server_stream, service, unary
from sandbox_tools.guest.processes import Process, Processes, Reader
from sandbox_tools.guest.spawn import Command, InputError

if TYPE_CHECKING:
    from starlette.routing import Route

    from sandbox_tools.guest.envelopes import Message
    from sandbox_tools.guest.settings import Settings

T = TypeVar("T")

KEEPALIVE: Message = {"event": {"keepalive": {}}}

SIGNALS = {
    "SIGNAL_SIGTERM": signal.SIGTERM,
    "SIGNAL_SIGKILL": signal.SIGKILL,
    15: signal.SIGTERM,
    9: signal.SIGKILL,
}

NO_MORE = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC}
"""Errors of a sandbox that is full, whatever the command."""


def routes(settings: Settings, processes: Processes) -> list[Route]:
    """The service's routes."""
    each = Service(settings, processes)
    return service(
        "process.Process",
        {
            "Start": server_stream(each.start, keepalive=KEEPALIVE),
            "Connect": server_stream(each.connect, keepalive=KEEPALIVE),
            "List": unary(each.list),
            "SendInput": unary(each.send_input),
            "StreamInput": client_stream(each.stream_input),
            "CloseStdin": unary(each.close_stdin),
            "SendSignal": unary(each.send_signal),
            "Update": unary(each.update),
        },
    )


class Service:
    """The procedures; each takes the message that its name has in envd's `process.proto`."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self._settings = settings
        self._processes = processes

    async def start(self, call: Call) -> AsyncIterator[Message | bytes]:
        """Starts a process and follows it. It is killed at the call's deadline, but goes on if the caller leaves."""
        command = _command(call)
        try:
            process = self._processes.start(command, self._settings.environment)
        except (OSError, ValueError) as error:
            raise _not_started(command, error) from error
        if call.timeout is not None:
            process.limit(call.timeout)
        with process.reading() as reader:
            yield {"event": {"start": {"pid": process.pid}}}
            async for piece in _follow(reader):
                yield piece
        if process.timed_out:
            msg = f"process {process.pid} ran past its deadline of {call.timeout} s and was killed"
            raise RpcError("deadline_exceeded", msg)
        yield _end(process)

    async def connect(self, call: Call) -> AsyncIterator[Message | bytes]:
        """Follows a process from now on."""
        process = self._find(call.message, ended=True)
        with process.reading() as reader:
            yield {"event": {"start": {"pid": process.pid}}}
            async for piece in _follow(reader):
                yield piece
        yield _end(process)

    async def list(self, call: Call) -> Message:
        """The processes that run."""
        return {"processes": [_info(process) for process in self._processes]}

    async def send_input(self, call: Call) -> Message:
        """Writes to a process; answered when it, or the buffer before it, has taken everything."""
        await _write(self._find(call.message), _object(call.message, "input"))
        return {}

    async def stream_input(self, call: Call, messages: AsyncIterator[Message]) -> Message:
        """Writes to a process what comes, in order."""
        process = None
        async for message in messages:
            if "start" in message:
                process = self._find(_object(message, "start"))
            elif "data" in message:
                if process is None:
                    raise RpcError("invalid_argument", "`data` came before `start`. Send `start` first.")
                await _write(process, _object(_object(message, "data"), "input"))
            elif "keepalive" not in message:
                raise RpcError("invalid_argument", "A message is neither `start` nor `data`. Send one of them.")
        return {}

    async def close_stdin(self, call: Call) -> Message:
        """Lets a process read the end of its input."""
        process = self._find(call.message)
        if process.command.size is not None:
            msg = f"process {process.pid} has a terminal, whose input cannot be closed. Send it Ctrl+D (0x04)."
            raise RpcError("failed_precondition", msg)

        if process.input is not None:
            await process.input.finish()
        return {}

    async def send_signal(self, call: Call) -> Message:
        """Sends SIGTERM or SIGKILL."""
        process = self._find(call.message)
        wanted = call.message.get("signal")
        number = SIGNALS.get(wanted) if isinstance(wanted, str | int) else None
        if number is None:
            msg = f"signal {wanted!r} cannot be sent. Send 'SIGNAL_SIGTERM' or 'SIGNAL_SIGKILL'."
            raise RpcError("unimplemented", msg)

        process.signal(number)
        return {}

    async def update(self, call: Call) -> Message:
        """Resizes a terminal."""
        process = self._find(call.message)
        if call.message.get("pty") is not None:
            try:
                await process.resize(*_size(_object(call.message, "pty")))
            except (InputError, OSError) as error:
                msg = f"error resizing the terminal of process {process.pid}: {error}"
                raise RpcError("internal", msg) from error
        return {}

    def _find(self, message: Message, *, ended: bool = False) -> Process:
        """The process that is meant.

        Args:
            ended: It may also be one that ended a short while ago.
        """
        selector = _object(message, "process")
        if "pid" in selector:
            pid = _whole(selector, "pid", 0xFFFFFFFF)
            process, name = self._processes.get(pid), f"pid {pid}"
        elif "tag" in selector:
            tag = _checked(selector, "tag", str, "a string") or ""
            process, name = self._processes.tagged(tag), f"tag {tag}"
        else:
            raise RpcError("invalid_argument", "`process` has neither `pid` nor `tag`. Send one of them.")
        if process is None or (process.end is not None and not ended):
            msg = f"process with {name} not found"
            raise RpcError("not_found", msg)

        return process


async def _follow(reader: Reader) -> AsyncIterator[bytes]:
    while (piece := await reader.take()) is not None:
        yield piece


async def _write(process: Process, what: Message) -> None:
    kind = "pty" if process.command.size is not None else "stdin"
    if kind not in what:
        msg = f"error writing to process {process.pid}: it takes its input as `{kind}`. Send that."
        raise RpcError("internal", msg)
    try:
        data = base64.b64decode(_checked(what, kind, str, "a string in base64") or "", validate=True)
    except ValueError as error:
        msg = f"`{kind}` is not base64 ({error}). Encode the bytes."
        raise RpcError("invalid_argument", msg) from error
    if process.input is None:
        msg = f"error writing to stdin of process {process.pid}: stdin not enabled. Start it with `stdin`: true."
        raise RpcError("internal", msg)

    try:
        await process.input.write(data)
    except InputError as error:
        msg = f"error writing to {kind} of process {process.pid}: {error}"
        raise RpcError("internal", msg) from error


def _command(call: Call) -> Command:
    config = _object(call.message, "process")
    cmd = _checked(config, "cmd", str, "a string")
    if not cmd:
        raise RpcError("invalid_argument", "`process.cmd` is missing. Send the program to run.")
    cwd = _checked(config, "cwd", str, "a string") or ""
    try:
        directory = resolve(cwd, call.account)
        if not directory.exists():
            msg = f"cwd '{directory}' does not exist"
            raise RpcError("invalid_argument", msg)
        if not directory.is_dir():
            msg = f"cwd '{directory}' is not a directory"
            raise RpcError("invalid_argument", msg)
    except (BadPathError, OSError) as error:
        msg = f"cwd {cwd!r} cannot be used: {error}"
        raise RpcError("invalid_argument", msg) from error

    stdin = _checked(call.message, "stdin", bool, "true or false")
    return Command(
        cmd=cmd,
        args=tuple(_strings(_checked(config, "args", list, "a list of strings") or [], "args")),
        envs=_envs(_checked(config, "envs", dict, "an object of strings") or {}),
        cwd=directory,
        account=call.account,
        tag=_checked(call.message, "tag", str, "a string"),
        stdin=stdin is not False,
        size=None if call.message.get("pty") is None else _size(_object(call.message, "pty")),
    )


def _not_started(command: Command, error: OSError | ValueError) -> RpcError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.errno in NO_MORE:
        msg = f"error starting process '{command.cmd}': {why}. The sandbox is full: end some of its processes."
        return RpcError("resource_exhausted", msg)

    return RpcError("invalid_argument", f"error starting process '{command.cmd}': {why}")


def _info(process: Process) -> Message:
    command = process.command
    info: dict[str, Any] = {
        "config": {
            "cmd": command.cmd,
            "args": list(command.args),
            "envs": dict(command.envs),
            "cwd": str(command.cwd),
        },
        "pid": process.pid,
    }
    return info if command.tag is None else {**info, "tag": command.tag}


def _end(process: Process) -> Message:
    end = process.end
    assert end is not None
    event: dict[str, Any] = {"exitCode": end.exit_code, "exited": end.exited, "status": end.status}
    if end.exit_code != 0:
        event["error"] = end.status
    return {"event": {"end": event}}


def _size(terminal: Message) -> tuple[int, int]:
    """Rows and columns."""
    size = terminal.get("size")
    if size is None:
        return 0, 0
    if not isinstance(size, dict):
        raise RpcError("invalid_argument", "`pty.size` is not an object. Send `cols` and `rows`.")

    return _whole(size, "rows", 0xFFFF), _whole(size, "cols", 0xFFFF)


def _object(message: Message, name: str) -> Message:
    value = _checked(message, name, dict, "an object")
    if value is None:
        raise RpcError("invalid_argument", f"`{name}` is missing. Send it.")

    return value


def _whole(message: Message, name: str, most: int) -> int:
    """A number, which JSON of protocol buffers may also have as a string; 0 where there is none."""
    value: Any = message.get(name)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise RpcError("invalid_argument", f"`{name}` is {value!r}. Send a whole number from 0 to {most}.")

    return value


def _checked(message: Message, name: str, kind: type[T], words: str) -> T | None:
    value: Any = message.get(name)
    if value is not None and not isinstance(value, kind):
        raise RpcError("invalid_argument", f"`{name}` is not {words}. Send one, or leave it out.")

    return value


def _strings(values: list[Any], name: str) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise RpcError("invalid_argument", f"`{name}` is not a list of strings. Send one, or leave it out.")

    return values


def _envs(envs: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in envs.values()):
        raise RpcError("invalid_argument", "`envs` is not an object of strings. Send one, or leave it out.")

    return envs
