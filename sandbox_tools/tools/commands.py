"""Commands of the shell: to their end, or as jobs in the background whose output waits in a file."""

from __future__ import annotations

import secrets
import shlex

from pydantic import Field

from sandbox_tools.client import Sandbox
from sandbox_tools.errors import ExecutionTimeoutError, NotFoundError
from sandbox_tools.models import CommandResult, Execution
from sandbox_tools.session.session import Session
from sandbox_tools.tools.live import live
from sandbox_tools.tools.render import Rendered, RetryableByModel, render_command
from sandbox_tools.tools.tool import Arguments, Emit, Hints, Tool

JOBS = "/tmp/.sandbox-tools-jobs"
"""Where a job's output, process id and exit code are."""

TAIL = 16_000
"""Bytes of a job's output in one reading."""

JOB = r"job-[a-z0-9]{8}"


class RunCommand(Arguments):
    """Arguments of `run_command`."""

    command: str = Field(description="A command line for bash.")
    cwd: str | None = Field(default=None, description="Where it runs. Leave it out for the home directory.")
    timeout: float = Field(default=120, gt=0, le=3600, description="Seconds after which the command is killed.")


class StartJob(Arguments):
    """Arguments of `start_job`."""

    command: str = Field(description="A command line for bash.")
    cwd: str | None = Field(default=None, description="Where it runs. Leave it out for the home directory.")


class ReadJob(Arguments):
    """Arguments of `read_job`."""

    job: str = Field(pattern=f"^{JOB}$", description="What `start_job` gave.")


class StopJob(Arguments):
    """Arguments of `stop_job`."""

    job: str = Field(pattern=f"^{JOB}$", description="What `start_job` gave.")


async def _run(session: Session, arguments: RunCommand, emit: Emit) -> Rendered:
    async with session.lease() as sandbox, live(emit) as say:
        try:
            result = await sandbox.commands.run(
                arguments.command,
                cwd=arguments.cwd,
                timeout=arguments.timeout,
                on_stdout=lambda text: say("stdout", text),
                on_stderr=lambda text: say("stderr", text),
            )
        except ExecutionTimeoutError as error:
            seen = error.partial or Execution()
            said = f"The command was killed after {arguments.timeout:g} s. Give it longer, or use `start_job`."
            result = CommandResult(exit_code=-1, stdout=seen.stdout, stderr=seen.stderr, error="timeout")
            return render_command(result, before=f"{said} Until then it had put out:")
    return render_command(result)


async def _start(session: Session, arguments: StartJob, emit: Emit) -> Rendered:
    job = "job-" + "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(8))
    # The shell waits for the command, so that its exit code is kept and the sandbox knows that something runs.
    script = (
        f"mkdir -p {JOBS} && {{ bash -l -c {shlex.quote(arguments.command)}; }} >{JOBS}/{job}.out 2>&1 </dev/null; "
        f"echo $? >{JOBS}/{job}.code"
    )
    async with session.lease() as sandbox:
        async with await sandbox.commands.start(script, cwd=arguments.cwd, timeout=None) as command:
            await sandbox.files.write(f"{JOBS}/{job}.pid", str(command.pid))
    text = f"Started {job}. Read its output with `read_job`; end it with `stop_job`. While it runs nothing is paused."
    return Rendered.of(text, job=job, pid=command.pid)


async def _read(session: Session, arguments: ReadJob, emit: Emit) -> Rendered:
    async with session.lease() as sandbox:
        code, running = await _state(sandbox, arguments.job)
        out = shlex.quote(f"{JOBS}/{arguments.job}.out")
        tail = await sandbox.commands.run(f"stat -c %s {out}; tail -c {TAIL} {out}")
    size, _, text = tail.stdout.partition("\n")
    left_out = max(0, int(size or 0) - TAIL) if tail.exit_code == 0 else 0
    head = f"{arguments.job} is running." if running else f"{arguments.job} ended with exit code {code}."
    cut = f"\n[{left_out} bytes before this are left out; they are in {JOBS}/{arguments.job}.out]" if left_out else ""
    artifact = {"job": arguments.job, "running": running, "exit_code": code}
    return Rendered.of(f"{head}{cut}\n{text or '[no output yet]'}", **artifact)


async def _stop(session: Session, arguments: StopJob, emit: Emit) -> Rendered:
    async with session.lease() as sandbox:
        _, running = await _state(sandbox, arguments.job)
        if running:
            pid = int(await sandbox.files.read(f"{JOBS}/{arguments.job}.pid"))
            running = await sandbox.commands.kill(pid)
    text = f"Stopped {arguments.job}." if running else f"{arguments.job} had ended already."
    return Rendered.of(text, job=arguments.job)


async def _state(sandbox: Sandbox, job: str) -> tuple[int | None, bool]:
    """Its exit code, None where it has none (it runs, or was killed), and whether it runs."""
    try:
        pid = int(await sandbox.files.read(f"{JOBS}/{job}.pid"))
    except NotFoundError:
        msg = f"There is no job {job!r} in this sandbox. Take what `start_job` gave."
        raise RetryableByModel(msg) from None
    # Asked in this order: one that ends in between has written its exit code before.
    running = any(process.pid == pid for process in await sandbox.commands.list())
    try:
        return int(await sandbox.files.read(f"{JOBS}/{job}.code")), False
    except NotFoundError:
        return None, running


RUN_COMMAND = Tool(
    name="run_command",
    title="Run command",
    description=(
        "Run a shell command in your sandbox to its end, for what is easier in bash than in Python: git, package "
        "managers, compilers. Files, and processes it leaves running, are kept from call to call; its variables and "
        "directory are not. Returns its output and, where it failed, its exit code."
    ),
    arguments=RunCommand,
    call=_run,
    hints=Hints(destructive=True),
)

START_JOB = Tool(
    name="start_job",
    title="Start background job",
    description=(
        "Start a shell command in the background of your sandbox and return at once: servers, training, downloads. "
        "The sandbox stays awake, and costs, until the job ends; it survives a pause, should one be asked for."
    ),
    arguments=StartJob,
    call=_start,
    hints=Hints(destructive=True),
)

READ_JOB = Tool(
    name="read_job",
    title="Read background job",
    description="Tell whether a background job still runs or how it ended, and the end of its output.",
    arguments=ReadJob,
    call=_read,
    hints=Hints(read_only=True, idempotent=True),
)

STOP_JOB = Tool(
    name="stop_job",
    title="Stop background job",
    description="Kill a background job and what it has started. Its output can still be read.",
    arguments=StopJob,
    call=_stop,
    hints=Hints(destructive=True, idempotent=True),
)
