"""What bounds a sandbox besides its memory: the disk that it fills, its share of the CPUs, processes, open files.

| what | how | for an ordinary user's engine too |
|---|---|---|
| bytes written to its files | gVisor keeps them in one file of the host's, whose size has a limit | yes |
| `/tmp` and `/dev/shm` | their size: they lie in its memory | yes |
| processes and open files | limits of the guest's (`RLIMIT_NPROC`, `RLIMIT_NOFILE`), which gVisor enforces | yes |
| CPU time | a control group | no |
| memory and threads of gVisor itself | a control group | no |
"""

from __future__ import annotations

import json
import logging
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox_tools.engine.outside import WayOut
from sandbox_tools.engine.reach import Rules

if TYPE_CHECKING:
    from sandbox_tools.engine.bodies import NewSandbox
    from sandbox_tools.engine.entry import Entry
    from sandbox_tools.engine.records import Record

log = logging.getLogger(__name__)

DEFAULT_DISK_MB = 10240

DISK = "tools.sandbox.disk-mb"
"""The annotation of a bundle that says how much its sandbox may write."""

# gVisor lets the files behind a sandbox grow by so much at a time (pgalloc's chunks): less could not be told apart.
_STEP_MB = 1024

# What a process adds to the length, though not the size, of the file that gVisor shares with its stubs: seen 18.
_PROCESS_MB = 20

_PERIOD = 100_000  # microseconds, the kernel's own default


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What every sandbox of an engine may take at most.

    Attributes:
        disk_mb: MB that it may write to its files, rounded up to whole GiB, and `least_disk_mb` at least, as the
            limit holds for what gVisor keeps of memory and processes as well. 0: no limit. None: as its template says,
            or `DEFAULT_DISK_MB`.
        cpus: Cores' worth of CPU time; only root's engine can enforce it. None: as its template says.
        internet: Whether those that were created while this was so reach the internet, unless they were not to.
    """

    disk_mb: int | None = None
    cpus: float | None = None
    internet: bool = False

    def lets_out(self, record: Record) -> bool:
        """Whether a sandbox has a way out."""
        return self.internet and record.internet

    def way_out(self, entry: Entry) -> WayOut:
        """What the streams that a sandbox opens go through; its record is looked at for each."""
        return WayOut(entry.record.id, lambda: Rules.of(entry.record.network) if self.lets_out(entry.record) else None)

    def granted(self, request: NewSandbox) -> NewSandbox:
        """A request for a sandbox, with what it gets of the internet in place of what it asks for.

        Raises:
            ConfigError: Its rules for what goes out can't be understood.
        """
        asked = self.internet and request.allow_internet_access is not False
        if asked and request.network is not None:
            Rules.of(request.network.model_dump(by_alias=True))
        return request.model_copy(update={"allow_internet_access": asked})

    def applied(self, config: dict[str, Any]) -> dict[str, Any]:
        """An OCI configuration with these bounds in it; the narrower one counts where it has one of its own."""
        resources = config["linux"]["resources"]
        quota = resources.get("cpu", {}).get("quota")
        if self.cpus is not None and (quota is None or quota > self.cpus * _PERIOD):
            resources = {**resources, "cpu": {"quota": max(1000, round(self.cpus * _PERIOD)), "period": _PERIOD}}
        own = config.get("annotations", {})
        annotations = {**own, DISK: str(self.disk(int(own[DISK]) if DISK in own else None))}
        return {**config, "annotations": annotations, "linux": {**config["linux"], "resources": resources}}

    def disk(self, of_template: int | None) -> int:
        """What a sandbox may write to its files, in MB, where its template says so much; 0: no limit."""
        if self.disk_mb is None:
            return DEFAULT_DISK_MB if of_template is None else of_template
        # 0 is no limit here, and not the narrowest.
        return min((each for each in (self.disk_mb, of_template) if each), default=0)


def file_limit(bundle: Path) -> int | None:
    """Bytes that a file of the container's may have on the host. None: as many as it likes."""
    try:
        config = json.loads((bundle / "config.json").read_bytes())
        disk_mb = int(config["annotations"][DISK])
        memory = int(config["linux"]["resources"]["memory"]["limit"])
    except (OSError, ValueError, KeyError):  # of a release that knew no such limit
        return None
    return None if disk_mb == 0 else size_in_force(disk_mb, memory >> 20) << 20


def size_in_force(disk_mb: int, memory_mb: int) -> int:
    """The limit, in MB, that comes of a wish for one."""
    return -(-max(disk_mb, least_disk_mb(memory_mb)) // _STEP_MB) * _STEP_MB


def least_disk_mb(memory_mb: int) -> int:
    """MB below which a limit would end a sandbox that does no more than it may: its memory and its processes."""
    return max(memory_mb, most_processes(memory_mb) * _PROCESS_MB) + _STEP_MB


def most_processes(memory_mb: int) -> int:
    """Processes and threads that one user of a sandbox may have."""
    # A Python that was forked and sleeps takes 4 MB: so many leave a third of the memory to the rest.
    return min(max(128, memory_mb // 6), 1024)


def limit_files(pid: int, limit: int | None) -> None:
    """Let no file that the process writes grow further; what asks for more inside is refused. None: without a limit.

    gVisor passes the refusal on as it came, as an error of the write, and lives on; the signal that a process gets with
    it (setrlimit(2)) is one that its runtime, Go's, takes no notice of.
    """
    try:
        # The hard limit stays where it is, or an ordinary user's engine could not lift the soft one for a checkpoint.
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        soft = hard if limit is None else limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    except ProcessLookupError:
        pass  # gone
    except PermissionError:
        log.warning("What process %d writes could not be limited: this user has no power over it", pid)


def process_limits(memory_mb: int) -> list[dict[str, Any]]:
    """The OCI configuration's `process.rlimits`, which every process inside inherits and only lowers."""
    limits = {"RLIMIT_NPROC": most_processes(memory_mb), "RLIMIT_NOFILE": 8192}
    return [{"type": kind, "soft": limit, "hard": limit} for kind, limit in limits.items()]
