"""Where this machine keeps its sandboxes: the only thing a client must know of a local engine to find it."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_tools.errors import ConfigError


def state_directory() -> Path:
    """`SANDBOX_TOOLS_STATE_DIR`, else `sandbox-tools` under the XDG state directory (XDG Base Directory 0.8)."""
    chosen = os.environ.get("SANDBOX_TOOLS_STATE_DIR")
    if chosen:
        return Path(chosen).absolute()

    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "sandbox-tools"


def templates_directory(state: Path) -> Path:
    """`SANDBOX_TOOLS_TEMPLATES_DIR`, else `templates` in the state directory; engines may share one."""
    chosen = os.environ.get("SANDBOX_TOOLS_TEMPLATES_DIR")
    return Path(chosen).absolute() if chosen else state / "templates"


def socket_path(state: Path) -> Path:
    """The engine's Unix socket in a state directory.

    Raises:
        ConfigError: The path is longer than the 107 bytes that Linux allows for a socket (unix(7)).
    """
    path = state / "engine.sock"
    if len(os.fsencode(path)) > 107:
        msg = f"The socket path {str(path)!r} is longer than 107 bytes. Set `SANDBOX_TOOLS_STATE_DIR` to a shorter one."
        raise ConfigError(msg, op="serve")

    return path
