"""What the engine knows of a sandbox, as plain data on disk."""

from __future__ import annotations

import math
import os
import secrets
import string
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sandbox_tools.engine.bodies import NewSandbox
from sandbox_tools.engine.images.saved import Origin
from sandbox_tools.engine.images.snapshots import write_durably
from sandbox_tools.models import DEFAULT_TIMEOUT, Lifecycle, SandboxGrant, SandboxInfo, Spent, State

CLIENT_ID = "6532622b"
"""The constant that E2B returns; nothing depends on it."""

ENVD_VERSION = "0.6.13"
"""What SDKs take the sandbox to be able to do."""

RECORD = "record.json"

_STARTS_KEPT = 20

TRAFFIC_SECONDS = 300
"""How long a sandbox lives at least after traffic has woken it (PROTOCOL.md section 6)."""


class IdempotencyMark(BaseModel):
    """The key that a sandbox was created under, a digest of what was asked for, and when."""

    key: str
    digest: str
    at: datetime


class Record(BaseModel):
    """One sandbox. `state` says where its truth is: in a live container, or in a snapshot."""

    id: str
    template: str
    """The template version it was made from: its root file system must outlive the sandbox."""
    template_name: str
    runsc: str
    """The pinned `runsc` it runs under, all its life."""
    state: State
    run: str
    """Names its container: every resume makes a new one, and a name is never used twice."""
    snapshot: str | None = None
    """The name of the snapshot to resume from; only while paused."""
    snapshot_bytes: int = 0
    started_at: datetime
    end_at: datetime
    """Running: when the timeout is reached. Paused: when it was paused."""
    frozen: bool = False
    """Whether it stands still in RAM; only of meaning while it runs. Whoever reaches it thaws it."""
    since: datetime | None = None
    """When it began to do what it does: to run, stand still or sleep. None: at `started_at`; paused, at `end_at`."""
    spent: Spent = Spent()
    """Until then."""
    auto_pause: bool
    auto_resume: bool = False
    secure: bool = True
    token: str
    memory_mb: int
    cpu: float | None = None
    """Cores' worth of CPU time that its template gives it. None: all there are."""
    disk_mb: int | None = None
    """What its template lets it write to its files, in MB. None: it does not say."""
    metadata: dict[str, str] = {}
    timeout: int = DEFAULT_TIMEOUT
    """Seconds asked for at its creation. Traffic that wakes it gives it as many, and `TRAFFIC_SECONDS` at least."""
    auto_pause_memory: bool = True
    """Whether the pause at the timeout keeps memory and processes, or files only."""
    pause_memory: bool = True
    """Whether the snapshot it sleeps in keeps memory and processes; only of meaning while paused."""
    traffic_token: str | None = None
    """Demanded by its ports but envd's. None: whoever reaches them may call."""
    network: dict[str, Any] | None = None
    """What was asked for, as it was sent. None: nothing."""
    internet: bool = False
    """Whether it was created to reach the internet; it does where the engine still lets it."""
    earlier_starts: list[datetime] = []
    """When the runs before this one began, newest first and a few at most: a listing under way goes by them."""
    keep_history: int = 0
    """How many of its pauses are kept as snapshots after it was resumed from them."""
    idempotency: IdempotencyMark | None = None
    """None: it was created without a key."""

    @property
    def wakes(self) -> bool:
        """Whether traffic wakes it; not where that would be a reboot, as its memory was dropped."""
        return self.auto_resume and (self.state == "running" or self.pause_memory)

    @property
    def cpu_count(self) -> int:
        """The cores that it can keep busy, as whole ones."""
        cores = os.cpu_count() or 1
        return cores if self.cpu is None else min(cores, math.ceil(self.cpu))

    def turned(self, now: datetime, **changes: Any) -> Record:
        """The record of a sandbox that begins to run, to stand still or to sleep."""
        return self.model_copy(update={"frozen": False, **changes, "since": now, "spent": self.spent_by(now)})

    def spent_by(self, now: datetime) -> Spent:
        """What it has spent in each state, the present one included."""
        began = self.since or (self.started_at if self.state == "running" else self.end_at)
        # The wall clock may be set back.
        seconds = max(0.0, (now - began).total_seconds())
        present = "frozen" if self.frozen else self.state
        return self.spent.model_copy(update={present: getattr(self.spent, present) + seconds})

    def resumed(self, now: datetime, end: datetime) -> Record:
        """The record of its next run."""
        return self.turned(
            now,
            state="running",
            run=new_run(),
            snapshot=None,
            snapshot_bytes=0,
            started_at=now,
            end_at=end,
            pause_memory=True,
            earlier_starts=[self.started_at, *self.earlier_starts][:_STARTS_KEPT],
        )

    def save(self, directory: Path) -> None:
        """Write it durably."""
        write_durably(directory / RECORD, self.model_dump_json())

    @classmethod
    def load(cls, directory: Path) -> Record | None:
        """The record in a sandbox's directory; None where there is none that can be read."""
        try:
            return cls.model_validate_json((directory / RECORD).read_bytes())
        except (OSError, ValidationError):
            return None

    def grant(self, domain: str | None = None) -> SandboxGrant:
        """What create and connect answer."""
        return SandboxGrant(
            sandbox_id=self.id,
            template_id=self.template_name,
            client_id=CLIENT_ID,
            envd_version=ENVD_VERSION,
            envd_access_token=self.token,
            traffic_access_token=self.traffic_token,
            domain=domain,
        )

    def info(self, now: datetime, *, pausing: bool = False) -> SandboxInfo:
        """A row of a listing; a sandbox on its way to a snapshot is shown as paused already."""
        return SandboxInfo(
            sandbox_id=self.id,
            template_id=self.template_name,
            client_id=CLIENT_ID,
            state="paused" if pausing else self.state,
            started_at=self.started_at,
            end_at=self.end_at,
            metadata=self.metadata,
            cpu_count=self.cpu_count,
            memory_mb=self.memory_mb,
            envd_version=ENVD_VERSION,
            lifecycle=Lifecycle(auto_resume=self.auto_resume, on_timeout="pause" if self.auto_pause else "kill"),
            snapshot_bytes=self.snapshot_bytes,
            frozen_since=self.since if self.frozen and not pausing else None,
            spent=self.spent_by(now),
        )


def new_run() -> str:
    """A name for a sandbox's next container."""
    return secrets.token_hex(4)


def new_token() -> str:
    """What callers of a sandbox must send."""
    return secrets.token_hex(24)


def new_id() -> str:
    """A sandbox id as E2B's edge accepts it: lower-case letters and digits, `i` first."""
    return "i" + "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(20))


def new_record(
    origin: Origin, *, now: datetime, timeout: int, request: NewSandbox, mark: IdempotencyMark | None = None
) -> Record:
    """The record of a sandbox that is about to be created."""
    waking = request.auto_resume.enabled if request.auto_resume else False
    if request.auto_resume is None and request.auto_pause and request.metadata.get("auto_resume") == "true":
        # How PPIO's legacy domain is asked for it (PROTOCOL.md section 1.5).
        waking = True
    private = request.network is not None and request.network.allow_public_traffic is False
    return Record(
        id=new_id(),
        template=origin.template,
        template_name=origin.name,
        runsc=origin.runsc,
        state="running",
        run=new_run(),
        started_at=now,
        end_at=now + timedelta(seconds=timeout),
        auto_pause=request.auto_pause,
        auto_resume=waking,
        secure=request.secure,
        token=new_token(),
        memory_mb=origin.memory_mb,
        cpu=origin.cpu,
        disk_mb=origin.disk_mb,
        metadata=request.metadata,
        timeout=timeout,
        auto_pause_memory=request.auto_pause_memory,
        traffic_token=new_token() if private else None,
        keep_history=request.keep_history or 0,
        network=request.network.model_dump(by_alias=True, exclude_none=True) if request.network else None,
        internet=request.allow_internet_access is True,
        idempotency=mark,
    )


def copied(record: Record, *, now: datetime, timeout: int) -> Record:
    """The record of a copy: another sandbox with tokens of its own, and all else as it was asked for."""
    return record.model_copy(
        update={
            "id": new_id(),
            "run": new_run(),
            "started_at": now,
            "end_at": now + timedelta(seconds=timeout),
            "timeout": timeout,
            "token": new_token(),
            "traffic_token": None if record.traffic_token is None else new_token(),
            "earlier_starts": [],
            "idempotency": None,
            "frozen": False,
            "since": None,
            "spent": Spent(),
        }
    )
