"""What a local engine needs on this machine, looked at one by one; nothing is changed."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.engine.building.install import check_kind, check_namespaces, find_runsc
from sandbox_tools.engine.building.roots import find_root
from sandbox_tools.engine.images.memory import place
from sandbox_tools.errors import ConfigError, SandboxError
from sandbox_tools.paths import socket_path, templates_directory

LOCAL_EXTRA = ("click", "starlette", "uvicorn", "httptools", "prometheus_client", "rich", "trustme", "cryptography")

LEAST_ROOM = 2 << 30
"""Bytes on the disk below which the template, or the next pause of a large sandbox, may not fit."""

LEAST_MEMORY = 1 << 30
"""Bytes of tmpfs below which the image of a sandbox that has worked may not fit."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    words: str
    """What is there; where it is missing, what to do."""


def examine(state: Path) -> list[Finding]:
    """Look at everything that running sandboxes in this state directory needs."""
    checks: dict[str, Callable[[], str]] = {
        "machine": _machine,
        "packages": _packages,
        "namespaces": _namespaces,
        "control groups": _control_groups,
        "state directory": lambda: _writable(state),
        "disk": lambda: _disk(state),
        "memory for snapshots": _memory,
        "runsc": lambda: _runsc(state),
        "root file system": lambda: _root(templates_directory(state)),
        "engine": lambda: _engine(state),
    }
    return [_finding(what, check) for what, check in checks.items()]


def _finding(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, ok=True, words=check())
    except SandboxError as error:
        return Finding(what=what, ok=False, words=error.message)


def _machine() -> str:
    check_kind()
    return f"Linux on {platform.machine()}"


def _namespaces() -> str:
    check_namespaces()
    return "as root, none is needed" if os.geteuid() == 0 else "an ordinary user's may be made"


def _control_groups() -> str:
    if os.geteuid() != 0:
        return "not used by an ordinary user's engine: memory is bounded from inside only, CPU time not at all"
    unified = CONTROL_GROUPS / "cgroup.controllers"
    have = unified.read_text().split() if unified.exists() else [each.name for each in CONTROL_GROUPS.glob("*")]
    missing = [name for name in ("memory", "pids", "cpu") if name not in have]
    if missing or not os.access(CONTROL_GROUPS, os.W_OK):
        what = f"have no {' and no '.join(missing)} controller" if missing else "can't be written to"
        msg = f"{CONTROL_GROUPS} {what}, so sandboxes can't be bounded. Mount it, in a container with `--privileged`."
        raise ConfigError(msg)
    return "memory, processes and CPU time are bounded"


def _disk(state: Path) -> str:
    disk = os.statvfs(next(path for path in (state, *state.parents) if path.exists()))
    free = disk.f_bavail * disk.f_frsize
    if free < LEAST_ROOM:
        msg = f"only {free / 1e9:.1f} GB are free at {str(state)!r}. Make room, or set `SANDBOX_TOOLS_STATE_DIR`."
        raise ConfigError(msg)
    return f"{free / 1e9:.0f} GB free"


def _memory() -> str:
    where, size = place()
    if size < LEAST_MEMORY:
        msg = (
            f"{where} holds {size >> 20} MB, and an image is plain there for a moment. Make it larger (in a container "
            "`--shm-size`), name another tmpfs in `SANDBOX_TOOLS_MEMORY_DIR`, or `serve --no-encryption`."
        )
        raise ConfigError(msg)
    return f"{where} holds {size / 1e9:.0f} GB"


def _packages() -> str:
    missing = [name for name in LOCAL_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        msg = f"{', '.join(missing)} not installed. Run `pip install 'sandbox-tools[local]'`."
        raise ConfigError(msg)

    return "all of the `local` extra"


def _writable(state: Path) -> str:
    there = next(path for path in (state, *state.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        msg = f"{str(there)!r} can't be written to. Set `SANDBOX_TOOLS_STATE_DIR` to a directory that can."
        raise ConfigError(msg)

    socket_path(state)
    return str(state)


def _runsc(state: Path) -> str:
    runsc = find_runsc(state)
    return f"{runsc.path}, version {runsc.version}"


def _root(templates_dir: Path) -> str:
    root = find_root(templates_dir)
    if root is None:
        msg = (
            "not built yet. Run `sandbox-tools setup`, or leave it to the first use, which takes a minute longer then."
        )
        raise ConfigError(msg)

    return str(root)


def _engine(state: Path) -> str:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(socket_path(state)))
        except OSError:
            return "not running; it is started on first use"

    return "running"
