"""What both sides of the wire speak, as plain data: seconds, bytes (unless a name says MB), UTC."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from sandbox_tools.errors import CommandError

State = Literal["running", "paused"]
"""What the wire shows; transitions are shown as the nearest of the two (a sandbox being paused as `paused`)."""

DEFAULT_TIMEOUT = 300
"""Seconds a sandbox lives after create or connect, where the caller does not say (E2B's own default)."""

DEFAULT_TEMPLATE = "code-interpreter-v1"

ENVD_PORT = 49983
INTERPRETER_PORT = 49999


class Wire(BaseModel):
    """A body of the control plane: camelCase outside, unknown fields ignored, as E2B's SDKs do."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, alias_generator=to_camel)


class AutoResume(Wire):
    """Whether traffic wakes a paused sandbox."""

    enabled: bool = False


class CreateRequest(Wire):
    """The body of `POST /sandboxes` and `POST /v2/sandboxes`."""

    template_id: Annotated[str, Field(alias="templateID")] = DEFAULT_TEMPLATE
    timeout: int | None = None
    """Seconds until the server kills or pauses the sandbox. None: the server's default."""
    auto_pause: bool = False
    """Pause instead of kill when the timeout is reached."""
    auto_pause_memory: bool = True
    """False: that pause keeps files only."""
    auto_resume: AutoResume | None = None
    secure: bool = True
    metadata: dict[str, str] = {}
    env_vars: dict[str, str] = {}
    allow_internet_access: Annotated[bool | None, Field(alias="allow_internet_access")] = None


class ConnectRequest(Wire):
    """The body of `POST /sandboxes/{id}/connect`."""

    timeout: int | None = None
    """Seconds from now until the sandbox's end; never shortens. None: the server's default."""


class TimeoutRequest(Wire):
    """The body of `POST /sandboxes/{id}/timeout`."""

    timeout: Annotated[int, Field(ge=0)]
    """Seconds from now until the sandbox's end; may shorten. 0 ends it at once."""


class SandboxGrant(Wire):
    """What create and connect answer: the address of a sandbox and the right to use it."""

    sandbox_id: Annotated[str, Field(alias="sandboxID")]
    template_id: Annotated[str, Field(alias="templateID")]
    client_id: Annotated[str, Field(alias="clientID")] = ""
    envd_version: str = ""
    envd_access_token: Annotated[str | None, Field(repr=False)] = None
    """Sent with every call to the sandbox. None: the sandbox asks for none."""
    traffic_access_token: Annotated[str | None, Field(repr=False)] = None
    domain: str | None = None
    """Where the sandbox's own addresses live. None: the client's configured domain."""
    alias: str | None = None


class Lifecycle(Wire):
    """What happens at the timeout, and whether traffic wakes the sandbox."""

    auto_resume: bool = False
    on_timeout: Literal["kill", "pause"] = "kill"


class Spent(Wire):
    """Seconds in each state since a sandbox was created."""

    running: float = 0.0
    """Frozen ones are not counted here."""
    frozen: float = 0.0
    paused: float = 0.0


class SandboxInfo(Wire):
    """One row of a listing, or the answer to info."""

    sandbox_id: Annotated[str, Field(alias="sandboxID")]
    template_id: Annotated[str, Field(alias="templateID")]
    client_id: Annotated[str, Field(alias="clientID")] = ""
    alias: str | None = None
    state: State
    started_at: datetime
    """When its last run began."""
    end_at: datetime
    """Running: when its timeout is reached. Paused: when it was paused."""
    metadata: dict[str, str] = {}
    cpu_count: int = 0
    memory_mb: Annotated[int, Field(alias="memoryMB")] = 0
    disk_size_mb: Annotated[int, Field(alias="diskSizeMB")] = 0
    envd_version: str = ""
    lifecycle: Lifecycle | None = None
    resident_bytes: int | None = None
    """RAM held on the host now, 0 when paused. None: the provider does not say (only the local engine does)."""
    snapshot_bytes: int | None = None
    """Bytes on disk of the memory snapshot, 0 while running. None: the provider does not say."""
    frozen_since: datetime | None = None
    """When its processes were stopped, its RAM held; `state` is `"running"` then. None: they run, or it is paused."""
    expires_at: datetime | None = None
    """Paused: when the provider deletes it. None: not before it is killed, or the provider does not say."""
    spent: Spent | None = None
    """What it has been doing all its life. None: the provider does not say (only the local engine does)."""


class Metric(Wire):
    """One sample of what a sandbox takes; bytes, and None where the provider does not say."""

    timestamp: datetime
    cpu_count: int = 0
    cpu_used_pct: float = 0.0
    """Percent; 100 is one core, or all of them, as the provider counts."""
    mem_used: int | None = None
    mem_total: int | None = None
    mem_cache: int | None = None
    disk_used: int | None = None
    disk_total: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _mebibytes(cls, sample: Any) -> Any:
        if isinstance(sample, dict):
            # As PPIO's legacy domains say it.
            said = {f"mem{name}": sample.get(f"mem{name}MiB") for name in ("Used", "Total")}
            sane = {name: mib for name, mib in said.items() if isinstance(mib, int | float) and 0 <= mib < 2**43}
            sample = {name: int(mib * 1024**2) for name, mib in sane.items()} | sample
        return sample


class SnapshotInfo(Wire):
    """A snapshot; its id is a template for `create`."""

    snapshot_id: Annotated[str, Field(alias="snapshotID")]
    names: list[str] = []
    size_bytes: int | None = None
    """On disk. None: the provider does not say (only the local engine does)."""


class LogLine(Wire):
    """A line as the first version of the route shows it."""

    timestamp: datetime
    line: str


class LogEntry(Wire):
    """A line with its parts."""

    timestamp: datetime
    message: str
    level: str = "info"
    """`debug`, `info`, `warn` or `error`."""
    fields: dict[str, str] = {}


class Logs(Wire):
    """What happened to a sandbox, oldest first."""

    logs: list[LogLine] = []
    log_entries: list[LogEntry] = []

    @property
    def entries(self) -> list[LogEntry]:
        """The lines with their parts, where the provider sends those."""
        lines = [LogEntry(timestamp=each.timestamp, message=each.line) for each in self.logs]
        return self.log_entries or lines


class ErrorBody(Wire):
    """Every error of the control plane."""

    code: int
    message: str
    error_code: Annotated[str | None, Field(alias="error_code")] = None


class ForkResult(Wire):
    """One copy, or why there is none."""

    sandbox: SandboxGrant | None = None
    error: ErrorBody | None = None


class CloneResult(Wire):
    """The answer of PPIO's `clone`."""

    sandboxes: list[SandboxGrant]
    snapshot_template_id: str | None = None


# What `/execute` streams, one JSON object a line.


class Event(BaseModel):
    """One line of an execution; `type` says which."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Started(Event):
    """The kernel took the code; its execution counter."""

    type: Literal["number_of_executions"] = "number_of_executions"
    execution_count: int


class Stdout(Event):
    """A piece of standard output."""

    type: Literal["stdout"] = "stdout"
    text: str
    timestamp: str | int | None = None
    omitted_bytes: int = 0
    """Bytes on the wire of a piece that was larger than the client's limit and therefore dropped unread."""


class Stderr(Event):
    """A piece of standard error."""

    type: Literal["stderr"] = "stderr"
    text: str
    timestamp: str | int | None = None
    omitted_bytes: int = 0
    """Bytes on the wire of a piece that was larger than the client's limit and therefore dropped unread."""


class Result(Event):
    """One displayed value, in every form the kernel gave; images and PDF are base64."""

    type: Literal["result"] = "result"
    text: str | None = None
    html: str | None = None
    markdown: str | None = None
    svg: str | None = None
    png: str | None = None
    jpeg: str | None = None
    pdf: str | None = None
    latex: str | None = None
    json_: Annotated[Any, Field(alias="json")] = None
    javascript: str | None = None
    data: Any = None
    chart: Any = None
    extra: dict[str, Any] | None = None
    is_main_result: bool = False
    omitted_bytes: int = 0
    """Bytes on the wire of a result that was larger than the client's limit and therefore dropped unread."""


class Failure(Event):
    """The code raised: that is a result, not an exception of ours."""

    type: Literal["error"] = "error"
    name: str
    value: str
    traceback: str = ""


class Keepalive(Event):
    """Nothing happened for a while; the stream lives."""

    type: Literal["keepalive"] = "keepalive"


class Ended(Event):
    """The last line. A stream without it was cut off."""

    type: Literal["end_of_execution"] = "end_of_execution"


ExecutionEvent = Annotated[
    Started | Stdout | Stderr | Result | Failure | Keepalive | Ended,
    Field(discriminator="type"),
]


class Execution(BaseModel):
    """The outcome of one `run_code`, collected."""

    results: list[Result] = []
    stdout: str = ""
    """Standard output; if `stdout_omitted` is not 0, its beginning and its end, and a line in between that says so."""
    stderr: str = ""
    stdout_omitted: int = 0
    """Characters left out of `stdout` (bytes, for a piece that was dropped unread)."""
    stderr_omitted: int = 0
    failure: Failure | None = None
    """What the code raised. None: it ran to its end."""
    execution_count: int | None = None

    @property
    def text(self) -> str | None:
        """The text of the value of the code's last expression. None: it had none."""
        return next((result.text for result in self.results if result.is_main_result), None)


class CodeContext(BaseModel):
    """A kernel inside a sandbox, with variables of its own."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    language: str
    cwd: str


# What envd tells of files and processes.


class WrittenFile(Wire):
    """What was written."""

    path: str
    """Absolute, in the sandbox."""
    name: str
    type: Annotated[
        Literal["file", "directory", "symlink", "unspecified"],
        # `FILE_TYPE_FILE` in Connect, `file` over HTTP.
        BeforeValidator(lambda word: str(word).removeprefix("FILE_TYPE_").lower()),
    ] = "unspecified"
    """For a link, what it leads to; `"unspecified"` where that is nothing, or none of these."""
    metadata: dict[str, str] = {}


class EntryInfo(WrittenFile):
    """A file, directory or link."""

    size: int = 0
    """Bytes."""
    mode: int = 0
    """Permission bits."""
    permissions: str = ""
    """As `ls` shows them."""
    owner: str = ""
    group: str = ""
    modified_time: datetime | None = None
    symlink_target: str | None = None
    """Where it leads in the end. None: it is no link."""


class ProcessInfo(Wire):
    """A running command."""

    pid: int
    tag: str | None = None
    """A name that whoever started it gave it."""
    cmd: Annotated[str, Field(validation_alias=AliasPath("config", "cmd"))] = ""
    args: Annotated[list[str], Field(validation_alias=AliasPath("config", "args"))] = []
    cwd: Annotated[str | None, Field(validation_alias=AliasPath("config", "cwd"))] = None
    env: Annotated[dict[str, str], Field(validation_alias=AliasPath("config", "envs"), repr=False)] = {}
    """What was set for this command only; it may hold secrets."""


class CommandResult(BaseModel):
    """The outcome of one command, collected."""

    exit_code: int
    """-1: a signal ended it, which `error` names."""
    stdout: str = ""
    """Standard output; if `stdout_omitted` is not 0, its beginning and its end, and a line in between that says so."""
    stderr: str = ""
    stdout_omitted: int = 0
    """Characters left out of `stdout`."""
    stderr_omitted: int = 0
    error: str | None = None
    """How it ended, in words, such as `"exit status 3"`. None: well."""

    def check(self) -> Self:
        """Itself, where the command succeeded.

        Raises:
            CommandError: It did not; `result` is this.
        """
        if self.exit_code == 0:
            return self

        msg = f"The command failed ({self.error or f'exit status {self.exit_code}'}): {self.stderr[-500:]!r}."
        raise CommandError(msg, result=self)
