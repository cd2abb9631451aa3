"""The control groups that bound a sandbox, in both versions of them; only root's engine has any."""

from __future__ import annotations

import contextlib
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def of(pid: int) -> list[Path]:
    """Those that account for a process's memory and were made for its sandbox; one, or none."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "/sandbox-tools/" in path and controllers in ("", "memory"):
                found.append(Path(_ROOT, controllers, path.lstrip("/")))
    return found


def limit_memory(pid: int, limit: int | None) -> None:
    """Let a sandbox have so many bytes of memory. None: without a bound.

    Where it has more already and can't part with it, it keeps the bound that it had (version 1) or is ended (2).
    """
    for group in of(pid):
        # Version 2's first. A group has one of the two, unless it was removed meanwhile.
        for name, unbounded in (("memory.max", "max"), ("memory.limit_in_bytes", "-1")):
            with contextlib.suppress(OSError):
                if (group / name).exists():
                    (group / name).write_text(unbounded if limit is None else str(limit))
