"""Commands in a sandbox: run to their end, or left running and found again by their process id."""

from __future__ import annotations

import asyncio
import base64
import builtins
import codecs
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any

from sandbox_tools import telemetry
from sandbox_tools.client import rpc
from sandbox_tools.client.codec import ExecutionCollector
from sandbox_tools.client.sockets import completed
from sandbox_tools.client.wire import parsed, positive, was_there
from sandbox_tools.errors import ExecutionTimeoutError, ProtocolError, SandboxError, TransportError
from sandbox_tools.models import CommandResult, ProcessInfo, Stderr, Stdout

if TYPE_CHECKING:
    from sandbox_tools.client.sandbox import Sandbox

END_TIMEOUT = 5.0
"""Seconds to kill a command that nobody waits for any more."""

STARTING = (0.0, 0.1, 0.4)
"""Seconds before each look for a command whose start was cancelled: what asks for it may arrive later than a look."""

INPUT_PIECE = 1024 * 1024
"""Bytes of input in one message; envd takes a few MiB."""

Events = AsyncGenerator[rpc.Message, None]

Told = Callable[[str], None]
"""Called with each piece of output as it arrives."""


class Commands:
    """What `Sandbox.commands` is."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.started: set[int] = set()
        """Process ids of the commands started here whose end has not been seen here."""

    async def run(
        self,
        cmd: str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float | None = 60.0,
        stdin: bool = False,
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
    ) -> CommandResult:
        """Runs a command of bash to its end; one that fails is a result with another `exit_code` than 0.

        It is never sent twice. If this is cancelled, the command is killed, also where nobody has heard of its start
        yet: it is looked for half a second long, and what starts still later is ended by its `timeout` alone.

        Args:
            cwd: None: the user's home.
            env: Set for this command only.
            user: Who runs it. None: the sandbox's default user.
            timeout: Seconds from now until it is killed. None: no limit.
            stdin: Whether its input stays open. False: it is empty.

        Raises:
            ExecutionTimeoutError: It ran longer than `timeout`; `partial` holds what it had put out.
            SandboxExpiredError: The sandbox is gone.
            SandboxStateError: It is paused, and the command with it.
            TransportError: The connection broke; the command may be running still, until its `timeout`.
        """
        with telemetry.span("sandbox.exec", {"sandbox_id": self._sandbox.id}):
            command = await self.start(
                cmd, cwd=cwd, env=env, user=user, timeout=timeout, stdin=stdin, on_stdout=on_stdout, on_stderr=on_stderr
            )
            try:
                return await command.wait()
            except SandboxError:
                raise
            except BaseException:
                # Cancelled, or a callback raised: nobody is left who could end it.
                await completed(self._end_soon({"pid": command.pid}))
                raise
            finally:
                await command.disconnect()

    async def start(
        self,
        cmd: str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float | None = 60.0,
        stdin: bool = False,
        on_stdout: Told | None = None,
        on_stderr: Told | None = None,
    ) -> Command:
        """Starts a command in the background; arguments and errors are those of `run`."""
        op = "commands.run"
        positive(op, "timeout", timeout, self._sandbox.id)
        process: dict[str, Any] = {"cmd": "/bin/bash", "args": ["-l", "-c", cmd]}
        process |= {name: value for name, value in (("envs", dict(env or {})), ("cwd", cwd)) if value}
        tag = uuid.uuid4().hex
        message = {"process": process, "stdin": stdin, "tag": tag}
        events = rpc.stream(self._sandbox, "process.Process/Start", message, user=user, timeout=timeout, op=op)
        try:
            command = await self._followed(events, op, {Stdout: on_stdout, Stderr: on_stderr})
        except (asyncio.CancelledError, ExecutionTimeoutError):
            # It may be starting all the same, and nobody would ever know its id.
            await completed(self._end_soon({"tag": tag}, STARTING))
            raise

        self.started.add(command.pid)
        return command

    async def connect(self, pid: int, *, on_stdout: Told | None = None, on_stderr: Told | None = None) -> Command:
        """Follows a command from now on; what it put out before is not repeated.

        Raises:
            NotFoundError: There is none of that id, or it ended more than half a minute ago.
        """
        op = "commands.connect"
        events = rpc.stream(self._sandbox, "process.Process/Connect", {"process": {"pid": pid}}, op=op)
        return await self._followed(events, op, {Stdout: on_stdout, Stderr: on_stderr})

    async def kill(self, pid: int) -> bool:
        """Kills a command and the processes of its group.

        Returns:
            True: killed. False: none of that id was running.
        """
        return await self._kill({"pid": pid})

    async def list(self) -> builtins.list[ProcessInfo]:
        """The commands that run, whoever started them."""
        answer = await rpc.unary(self._sandbox, "process.Process/List", {}, op="commands.list")
        return parsed(list[ProcessInfo], answer.get("processes", []), "commands.list", self._sandbox.id)

    async def _kill(self, process: Mapping[str, int | str]) -> bool:
        message = {"process": process, "signal": "SIGNAL_SIGKILL"}
        return await was_there(rpc.unary(self._sandbox, "process.Process/SendSignal", message, op="commands.kill"))

    async def _end_soon(self, process: Mapping[str, int | str], looks: Sequence[float] = (0.0,)) -> None:
        """Kills it, if that can be done soon; `looks` says after how many seconds each it is looked for."""
        with suppress(SandboxError, TimeoutError):
            async with asyncio.timeout(END_TIMEOUT):
                for pause in looks:
                    await asyncio.sleep(pause)
                    if await self._kill(process):
                        return

    async def _followed(self, events: Events, op: str, told: Mapping[Any, Told | None]) -> Command:
        first: Any = await anext(events, {})
        try:
            return Command(self._sandbox, int(first["event"]["start"]["pid"]), events, op, told)
        except (TypeError, KeyError, ValueError) as error:
            await events.aclose()
            msg = f"The answer to `{op}` does not begin with a process id. Look at what runs."
            raise ProtocolError(msg, op=op, sandbox_id=self._sandbox.id) from error


class Command(AsyncIterator[Stdout | Stderr], AbstractAsyncContextManager["Command"]):
    """A command that `Commands.start` or `connect` gave: an async iterator of its output as it comes.

    Its output waits for whoever iterates, or `wait`s: if nobody does, the command is held up as soon as the buffers on
    the way are full. `disconnect` lets it run on, and so does leaving an `async with` of it.
    """

    def __init__(self, sandbox: Sandbox, pid: int, events: Events, op: str, told: Mapping[Any, Told | None]) -> None:
        self.pid = pid
        self._sandbox = sandbox
        self._events = events
        self._op = op
        self._told = told
        utf8 = codecs.getincrementaldecoder("utf-8")
        self._decoders = {Stdout: utf8("replace"), Stderr: utf8("replace")}
        self._pieces: deque[Stdout | Stderr] = deque()
        self._collector = ExecutionCollector()
        self._ended: dict[str, Any] | None = None

    async def __aexit__(self, *exc_info: object) -> None:
        await self.disconnect()

    async def __anext__(self) -> Stdout | Stderr:
        while not self._pieces:
            try:
                message = await anext(self._events)
            except ExecutionTimeoutError as error:
                error.partial = self._collector.execution()
                # For a server that does not keep to the limit.
                await completed(self._sandbox.commands._end_soon({"pid": self.pid}))
                raise

            self._pieces.extend(self._read(message))

        piece = self._pieces.popleft()
        self._collector.add(piece)
        if told := self._told[type(piece)]:
            told(piece.text)

        return piece

    async def wait(self) -> CommandResult:
        """Follows it to its end; the result has all its output since this object was made, also what was iterated over.

        If this is cancelled, the command runs on: `connect` again to follow it, or `kill` it.

        Raises:
            As `Commands.run`.
        """
        async for _ in self:
            pass

        if self._ended is None:
            msg = f"This lost process {self.pid} before its end was told. Use `commands.connect({self.pid})`."
            raise TransportError(msg, op=self._op, sandbox_id=self._sandbox.id)

        seen = self._collector.execution().model_dump(include=set(CommandResult.model_fields))
        end = {"exit_code": self._ended.get("exitCode", 0), "error": self._ended.get("error")}
        return parsed(CommandResult, seen | end, self._op, self._sandbox.id)

    async def kill(self) -> bool:
        """As `Commands.kill`."""
        return await self._sandbox.commands.kill(self.pid)

    async def send_stdin(self, data: str | bytes) -> None:
        """Writes to its input, and returns when it, or the pipe to it, has taken everything. Never sent twice.

        Raises:
            ServerError: It was started without `stdin`, or has closed it.
            NotFoundError: It has ended.
            RequestTimeoutError: It has not taken a part of it for a minute.
        """
        data = data.encode() if isinstance(data, str) else data
        for start in range(0, len(data), INPUT_PIECE):
            piece = base64.b64encode(data[start : start + INPUT_PIECE]).decode()
            await self._ask("SendInput", "commands.send_stdin", input={"stdin": piece})

    async def close_stdin(self) -> None:
        """Lets it read the end of its input.

        Raises:
            NotFoundError: It has ended.
        """
        await self._ask("CloseStdin", "commands.close_stdin")

    async def disconnect(self) -> None:
        """Stops following it; it runs on, until its `timeout`, and what it puts out is dropped."""
        await self._events.aclose()

    async def _ask(self, method: str, op: str, **more: Any) -> None:
        message = {"process": {"pid": self.pid}, **more}
        await rpc.unary(self._sandbox, f"process.Process/{method}", message, op=op)

    def _read(self, message: dict[str, Any]) -> Iterator[Stdout | Stderr]:
        try:
            event = message["event"]
            if "end" in event:
                self._ended = dict(event["end"])
                self._sandbox.commands.started.discard(self.pid)

            for kind, cls in (("stdout", Stdout), ("stderr", Stderr)):
                data = base64.b64decode(event.get("data", {}).get(kind, ""), validate=True)
                if text := self._decoders[cls].decode(data, final="end" in event):
                    yield cls(text=text)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            msg = f"The answer to `{self._op}` holds what is no event of a process. Look at what it has done."
            raise ProtocolError(msg, op=self._op, sandbox_id=self._sandbox.id) from error
