"""What a process and those below it take of the host, read from `/proc` and the control groups."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sandbox_tools.engine import groups
from sandbox_tools.engine.runtime import Container, Usage

_MEMORY_FILE = "/memfd:runsc-memory"

_GVISORS = 32 << 20  # seen 4, and it grows with what is open

_TICKS = os.sysconf("SC_CLK_TCK")


def measure(pid: int, container: Container) -> Usage:
    """What the container takes whose first process this is."""
    disk = os.statvfs(container.directory)
    return Usage(
        cpu_seconds=cpu_seconds(pid),
        memory=memory(pid),
        cache=_cache(pid),
        disk=_blocks(pid, f"{container.filestore}/"),
        disk_free=disk.f_bavail * disk.f_frsize,
    )


def image(pid: int, container: Container) -> int:
    """Bytes that an image of the container may have: its memory and its files, and what gVisor knows of both."""
    return _blocks(pid, _MEMORY_FILE, f"{container.filestore}/") + _GVISORS


def memory(pid: int) -> int:
    """RAM in bytes: what is a sandbox's own memory, mapped or not, and each process's share of all else (PSS)."""
    return _blocks(pid, _MEMORY_FILE) + sum(_proportional_bytes(each) for each in with_descendants(pid))


def with_descendants(pid: int) -> list[int]:
    """The processes below one, itself first."""
    found = [pid]
    for each in found:  # grows while it is walked
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _proportional_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        # gVisor keeps the sandbox's memory in a file, of which only a part is mapped at a time.
        return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_File")) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and those below it, children that have ended included."""
    ticks = 0
    for each in with_descendants(pid):
        with contextlib.suppress(OSError, IndexError):
            # After the name, which may hold blanks: fields 14 to 17 of proc(5), ended children included.
            fields = Path(f"/proc/{each}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def _cache(pid: int) -> int:
    for group in groups.of(pid):
        with contextlib.suppress(OSError):
            for line in (group / "memory.stat").read_text().splitlines():
                # `file` in version 2 of control groups, `cache` in version 1; memory that is shared is in both.
                name, _, value = line.partition(" ")
                if name in ("file", "cache"):
                    return int(value)
    return 0


def _blocks(pid: int, *names: str) -> int:
    """Bytes of open files whose names begin so; what has no name any more is found only by who holds it open."""
    found = {}
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                link = f"/proc/{pid}/fd/{fd}"
                if os.readlink(link).startswith(names):
                    held = os.stat(link)
                    found[held.st_dev, held.st_ino] = held.st_blocks * 512
    return sum(found.values())
