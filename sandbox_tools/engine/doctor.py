"""What a local engine needs on this machine, looked at one by one; nothing is changed."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.engine.install import check_machine, find_runsc
from sandbox_tools.engine.roots import find_root
from sandbox_tools.errors import ConfigError, SandboxError
from sandbox_tools.paths import socket_path, templates_directory

LOCAL_EXTRA = ("starlette", "uvicorn", "httptools", "rich", "trustme")


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
        "state directory": lambda: _writable(state),
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
    check_machine()
    rights = "root" if os.geteuid() == 0 else "an ordinary user, in a user namespace"
    return f"Linux on {platform.machine()}, as {rights}"


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
