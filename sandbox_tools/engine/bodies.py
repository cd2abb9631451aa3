"""The bodies of the control plane that only the engine reads and writes; those of both sides are in `models`."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AwareDatetime, BeforeValidator, ConfigDict, Field

from sandbox_tools.engine.images.saved import REFERENCE
from sandbox_tools.engine.journal import Level
from sandbox_tools.engine.listing import Order
from sandbox_tools.models import CreateRequest, LogEntry, SandboxInfo, Wire

MAX_TIMEOUT = 24 * 3600
"""Seconds; the longest that E2B's larger plan allows, for a timeout and for a run."""

MAX_PAGE = 100


def _whole(value: object) -> object:
    # JSON knows no integers: 300.0 is one.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _moment(value: object) -> object:
    # Numbers would be taken for seconds since the epoch.
    if isinstance(value, str) and not re.match(r"\d{4}-\d\d-\d\dT", value):
        msg = "not a moment as RFC 3339 writes it"
        raise ValueError(msg)
    return value


_WHOLE = BeforeValidator(_whole)

# The range is only documented here: what refuses a timeout says so in E2B's words.
Timeout = Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": MAX_TIMEOUT}), _WHOLE]
"""Seconds from now."""

# Documented here as well; `saved.normalised` says what is wrong with one.
_NAMED: dict[str, Any] = {"pattern": f"^{REFERENCE}$"}

NodeId = Annotated[str | None, Field(alias="nodeID")]


class Network(Wire):
    """What may go out and come in; whatever else is sent is kept and shown."""

    model_config = ConfigDict(extra="allow")

    allow_public_traffic: bool | None = None
    """False: the sandbox's ports ask for a token."""
    allow_out: list[str] | None = None
    deny_out: list[str] | None = None


class NewSandbox(CreateRequest):
    """The body of `POST /sandboxes` and `POST /v2/sandboxes`, as each vendor's SDK sends it."""

    template_id: Annotated[str, Field(alias="templateID", json_schema_extra=_NAMED)]
    timeout: Timeout | None = None
    allow_internet_access: Annotated[
        bool | None,
        Field(
            validation_alias=AliasChoices("allow_internet_access", "allowInternetAccess"),
            serialization_alias="allow_internet_access",
        ),
    ] = None
    """None: as True. Without effect where the engine was not started to allow it: there is no way out then."""
    network: Network | None = None
    keep_history: Annotated[int, Field(ge=0, le=100), _WHOLE] | None = None
    """How many of its last pauses stay as snapshots, listed with the others, until it is killed. None: as the engine
    was told. Only this engine has it."""
    volume_mounts: list[dict[str, Any]] | None = None
    mcp: dict[str, Any] | None = None
    iam: dict[str, Any] | None = None
    secrets: Any = None
    secret_envs: Any = None
    node_id: NodeId = None
    """Accepted and without effect: there is one node."""

    @property
    def unsupported(self) -> list[str]:
        """What is asked for and not here."""
        asked = {
            "volumeMounts": self.volume_mounts,
            "mcp": self.mcp,
            "iam": self.iam,
            "secrets": self.secrets,
            "secretEnvs": self.secret_envs,
        }
        return [name for name, value in asked.items() if value]


class Connect(Wire):
    """The body of `connect` and `resume`."""

    timeout: Timeout | None = None
    """None: the server's default. Never shortens."""
    memory: bool | None = None
    """False: a paused sandbox is rebooted. None: as True."""
    auto_pause: bool | None = None
    """Replaces what the sandbox does at its timeout, where it is resumed. None: as before."""
    secure: bool | None = None
    """None: as before."""
    network: Network | None = None
    allow_public_traffic: bool | None = None
    """None: as before."""

    @property
    def public(self) -> bool | None:
        """Whether its ports may be reached without a token. None: as before."""
        if self.allow_public_traffic is None and self.network is not None:
            return self.network.allow_public_traffic
        return self.allow_public_traffic


class Pause(Wire):
    """The body of `pause`."""

    memory: bool | None = None
    """False: keep files only. None: as True."""
    require_healthy_guest: bool | None = None
    """Refuse to pause a sandbox whose daemon does not answer."""
    sync: bool | None = None
    """Accepted and without effect: the answer always comes when the pause is complete."""


class SetTimeout(Wire):
    """The body of `timeout`."""

    timeout: Annotated[int, Field(ge=0), _WHOLE]
    """Seconds from now until the end; may shorten, and 0 ends it at once."""


class Refresh(Wire):
    """The body of `refreshes`."""

    duration: Annotated[int, Field(ge=0, le=3600), _WHOLE] | None = None
    """Seconds from now that it lives at least."""


class Fork(Wire):
    """The body of `fork`."""

    timeout: Timeout | None = None
    count: Annotated[int, Field(ge=1, le=100), _WHOLE] | None = None


class Clone(Wire):
    """The body of PPIO's `clone`."""

    timeout: Timeout | None = None
    count: Annotated[int, Field(ge=1, le=100), _WHOLE] | None = None
    strict: bool | None = None
    """Fail as a whole where one copy fails."""
    node_id: NodeId = None


class Reset(Connect):
    """The body of PPIO's `reset`."""

    resume: bool | None = None
    """False: leave it paused. None: as True."""


class TakeSnapshot(Wire):
    """The body of `snapshots`."""

    name: Annotated[str, Field(json_schema_extra=_NAMED)] | None = None
    memory: bool | None = None
    """False: sandboxes made from it begin with its files only. None: as True."""


# Query parameters.


class Filter(Wire):
    """Of `GET /sandboxes`."""

    metadata: str = ""
    """URL-encoded `key=value` pairs joined by `&`, all of which a sandbox must have."""


class ListQuery(Filter):
    """Of `GET /v2/sandboxes`."""

    state: Annotated[str, Field(pattern="^(running|paused)(,(running|paused))*$")] = "running,paused"
    """`running`, `paused`, or both joined by a comma."""
    order: Order | None = None
    started_after: Annotated[AwareDatetime, BeforeValidator(_moment)] | None = None
    template: str | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = MAX_PAGE
    next_token: str | None = None


class SnapshotsQuery(Wire):
    """Of `GET /snapshots`."""

    sandbox_id: Annotated[str | None, Field(alias="sandboxID")] = None
    name: str | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = MAX_PAGE
    next_token: str | None = None


class MetricsQuery(Wire):
    """Of `GET /sandboxes/{id}/metrics`."""

    start: Annotated[int, Field(ge=0)] | None = None
    """Unix time in seconds; in milliseconds where it can only be those."""
    end: Annotated[int, Field(ge=0)] | None = None


class ManyMetricsQuery(Wire):
    """Of `GET /sandboxes/metrics`."""

    sandbox_ids: Annotated[str, Field(alias="sandbox_ids")]
    """Ids joined by commas, 100 at most."""


class LogsQuery(Wire):
    """Of `GET /sandboxes/{id}/logs`."""

    start: Annotated[int, Field(ge=0)] | None = None
    """Unix time in milliseconds."""
    limit: Annotated[int, Field(ge=0, le=1000)] = 1000


class LogsV2Query(Wire):
    """Of `GET /v2/sandboxes/{id}/logs`."""

    cursor: Annotated[int, Field(ge=0)] | None = None
    """Unix time in milliseconds to begin at."""
    limit: Annotated[int, Field(ge=0, le=1000)] = 1000
    direction: Literal["forward", "backward"] = "forward"
    level: Level | None = None
    """The least serious that is wanted."""
    search: Annotated[str, Field(max_length=256)] = ""


# Answers.


class Detail(SandboxInfo):
    """The answer to info."""

    envd_access_token: Annotated[str | None, Field(repr=False)] = None
    allow_internet_access: bool | None = None
    domain: str | None = None
    network: Network | None = None
    pause_mode: Literal["full", "filesystem"] | None = None


class Metric(Wire):
    """One sample; bytes."""

    timestamp: datetime
    timestamp_unix: int
    cpu_count: int
    cpu_used_pct: float
    mem_used: int
    mem_total: int
    mem_cache: int
    disk_used: int
    disk_total: int
    # As PPIO's legacy domain names them.
    mem_used_mi_b: Annotated[int, Field(alias="memUsedMiB")]
    mem_total_mi_b: Annotated[int, Field(alias="memTotalMiB")]


class ManyMetrics(Wire):
    """The last sample of each sandbox that has one."""

    sandboxes: dict[str, Metric]


class LogsV2(Wire):
    """The answer of `GET /v2/sandboxes/{id}/logs`."""

    logs: list[LogEntry]
