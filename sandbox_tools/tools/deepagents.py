"""The sandbox as a backend of deepagents: its shell and its files, one instance for all conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from deepagents.backends.protocol import (
    ExecuteOffloadResult,
    ExecuteResponse,
    FileDownloadResponse,
    FileUploadResponse,
    WriteResult,
)
from deepagents.backends.sandbox import BaseSandbox
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config

from sandbox_tools.client import Sandbox
from sandbox_tools.client.codec import ExecutionCollector
from sandbox_tools.errors import (
    AccessDeniedError,
    APIError,
    ConfigError,
    ExecutionTimeoutError,
    NotFoundError,
    SandboxError,
)
from sandbox_tools.models import Stdout
from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools import portal
from sandbox_tools.tools.callback import join
from sandbox_tools.tools.files import beginning
from sandbox_tools.tools.owners import Owner, owner_of, thread_of
from sandbox_tools.tools.render import RetryableByModel, render_error, render_lost

T = TypeVar("T")

OUTPUT = 10_000_000
"""Characters of a command's output that are kept; deepagents itself puts what is long for a model into a file."""

LARGEST = 200_000_000
"""Bytes of one file that is handed out: code in the sandbox must not fill the memory of who looks at its files."""

TIMED_OUT = 124
"""The exit code of a command whose time was up, as `timeout` of coreutils has it."""


class SandboxBackend(BaseSandbox):
    """For `create_deep_agent(backend=...)`: each run works in the sandbox of its own conversation.

    The conversation is the `thread_id` of the run's config, never a model's word. Bake a `SandboxCallback` into the
    agent, `agent.with_config(callbacks=[SandboxCallback(sessions)])`, and the sandbox is paused when the turn ends and
    woken by the next one; without it the policy's idle time counts from the last call.

    Synchronous methods enter through the portal, and so do not work on the event loop that `sessions` belong to.

    Args:
        sessions: The registry. It is not closed with the backend.
        owner: As `SandboxToolkit`'s.
        thread: The conversation, for use outside of a graph or one sandbox for all runs. None: that of the run.
        timeout: Seconds after which a command is killed that was given no limit of its own. A command's own 0 means
            none at all.
        user: Who runs commands and owns files. None: the sandbox's default user; `"root"` may write anywhere, and
            kill what the sandbox itself needs.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        owner: Owner = "default",
        thread: str | None = None,
        timeout: float = 1800.0,
        user: str | None = None,
    ) -> None:
        self.sessions = sessions
        self._owner = owner
        self._thread = thread
        self._timeout = timeout
        self._user = user

    @property
    def id(self) -> str:
        """The name of its conversation, or of this package; sandboxes have ids that nobody is told."""
        return self._thread or "sandbox-tools"

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """Run a command of bash to its end; output and errors come joined, as they came.

        Raises:
            SandboxError: Only the operator can help. What the model can act on is output, with exit code 1.
        """
        return self._run(self._execute, command, timeout)

    async def aexecute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """As `execute`. Cancelled, the command is killed."""
        return await self._arun(self._execute, command, timeout)

    def execute_with_offload(self, command: str, capture_path: str, **options: Any) -> ExecuteOffloadResult:
        """What the model's own calls of `execute` come through, so here it is told that its sandbox was lost."""
        result = super().execute_with_offload(command, capture_path, **options)
        return _told(result, lost=self._run(Session.take_lost))

    async def aexecute_with_offload(self, command: str, capture_path: str, **options: Any) -> ExecuteOffloadResult:
        """As `execute_with_offload`."""
        result = await super().aexecute_with_offload(command, capture_path, **options)
        return _told(result, lost=await self._arun(Session.take_lost))

    def write(self, file_path: str, content: str) -> WriteResult:
        """Write a text file and the directories above it, also where the user of the commands could make none."""
        return _written(*self.upload_files([(file_path, content.encode())]))

    async def awrite(self, file_path: str, content: str) -> WriteResult:
        """As `write`."""
        return _written(*await self.aupload_files([(file_path, content.encode())]))

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """Write files, and the directories above them; each is there whole or not at all.

        Raises:
            SandboxError: Only the operator can help. Anything else is said of the file that it happened to.
        """
        return self._run(self._upload, files)

    async def aupload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """As `upload_files`."""
        return await self._arun(self._upload, files)

    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """Read files; errors are those of `upload_files`."""
        return self._run(self._download, paths)

    async def adownload_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """As `download_files`."""
        return await self._arun(self._download, paths)

    async def _execute(self, session: Session, command: str, timeout: float | None) -> ExecuteResponse:
        limit = self._timeout if timeout is None else timeout or None
        output = ExecutionCollector(max_stream_end=OUTPUT // 2)

        def collect(text: str) -> None:
            output.add(Stdout(text=text))

        end = ""
        try:
            async with session.lease() as sandbox:
                try:
                    done = await sandbox.commands.run(
                        command, user=self._user, timeout=limit, on_stdout=collect, on_stderr=collect
                    )
                    code = done.exit_code
                    if code < 0:
                        end = f"[{done.error}]"
                except ExecutionTimeoutError:
                    code, end = TIMED_OUT, f"[The command was killed after {limit:g} s.]"
        except SandboxError as error:
            code, end = 1, _words(error)
        seen = output.execution()
        text = f"{seen.stdout}\n{end}" if end and seen.stdout else seen.stdout + end
        return ExecuteResponse(output=text, exit_code=code, truncated=bool(seen.stdout_omitted))

    async def _upload(self, session: Session, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        async def write(sandbox: Sandbox, number: int) -> str | None:
            path, content = files[number]
            await sandbox.files.write(path, content, user=self._user)
            return None

        faults = await self._each(session, [path for path, _ in files], write)
        return [FileUploadResponse(path=path, error=fault) for (path, _), fault in zip(files, faults, strict=True)]

    async def _download(self, session: Session, paths: list[str]) -> list[FileDownloadResponse]:
        contents: list[bytes | None] = [None] * len(paths)

        async def read(sandbox: Sandbox, number: int) -> str | None:
            content, whole = await beginning(sandbox, paths[number], LARGEST, user=self._user)
            contents[number] = content if whole else None
            return None if whole else f"The file has more than {LARGEST // 1_000_000} MB."

        faults = await self._each(session, paths, read)
        return [
            FileDownloadResponse(path=path, content=content, error=fault)
            for path, content, fault in zip(paths, contents, faults, strict=True)
        ]

    async def _each(
        self, session: Session, paths: Sequence[str], move: Callable[[Sandbox, int], Awaitable[str | None]]
    ) -> list[str | None]:
        """What was wrong with each file, in the order of the paths. None: nothing."""
        faults: list[str | None] = []
        try:
            async with session.lease() as sandbox:
                for number, path in enumerate(paths):
                    faults.append(await self._moved(sandbox, path, partial(move, sandbox, number)))
        except SandboxError as error:
            faults += [_words(error)] * (len(paths) - len(faults))
        return faults

    async def _moved(self, sandbox: Sandbox, path: str, move: Callable[[], Awaitable[str | None]]) -> str | None:
        if not path.startswith("/"):
            return "invalid_path"
        try:
            return await move()
        except NotFoundError:
            return "file_not_found"
        except AccessDeniedError:
            return "permission_denied"
        except APIError as error:
            if error.status_code == 507:
                return "The sandbox's disk is full. Remove something first."
            if error.status_code != 400:
                raise
            return "is_directory" if await self._is_directory(sandbox, path) else "invalid_path"

    async def _is_directory(self, sandbox: Sandbox, path: str) -> bool:
        try:
            return (await sandbox.files.info(path, user=self._user)).type == "directory"
        except APIError:
            return False

    def _session(self) -> Session:
        """The conversation of the run that calls, which is a turn of it then."""
        try:
            config = get_config()
        except RuntimeError:  # There is no graph around this call.
            config = RunnableConfig()
        thread = self._thread or thread_of(config)
        session = self.sessions.session(thread, owner=owner_of(self._owner, config))
        join(config, self.sessions, session)
        return session

    def _run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        with _no_fault_of_arguments():
            return portal.run(self.sessions, partial(work, self._session(), *arguments))

    async def _arun(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        with _no_fault_of_arguments():
            return await portal.arun(self.sessions, partial(work, self._session(), *arguments))


@contextlib.contextmanager
def _no_fault_of_arguments() -> Iterator[None]:
    """deepagents takes a `ValueError` for arguments that the model got wrong, and goes on; a `ConfigError` is none."""
    try:
        yield
    except ConfigError as error:
        raise SandboxError(error.message, op=error.op) from error


def _told(result: ExecuteOffloadResult, *, lost: frozenset[str]) -> ExecuteOffloadResult:
    if not lost:
        return result
    response = result.response
    return replace(result, response=replace(response, output=f"{render_lost(lost)}\n{response.output}"))


def _written(response: FileUploadResponse) -> WriteResult:
    if response.error:
        return WriteResult(error=f"Failed to write file {response.path!r}: {response.error}")
    return WriteResult(path=response.path)


def _words(error: SandboxError) -> str:
    """What the model reads of it.

    Raises:
        SandboxError: The error itself, where only the operator can help.
    """
    try:
        rendered = render_error(error)
    except RetryableByModel as said:
        return str(said)
    return "\n".join(block["text"] for block in rendered.blocks)
