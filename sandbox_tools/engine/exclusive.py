"""One engine at a time for each state directory; the kernel lets go of it when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sandbox_tools.errors import ConfigError


class AlreadyRunningError(ConfigError):
    """Raised when another engine holds the state directory."""


@contextlib.contextmanager
def sole_engine(state: Path) -> Iterator[None]:
    """Hold a state directory, which is made where it is missing.

    Raises:
        AlreadyRunningError: An engine runs on it.
        ConfigError: It can't be used.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state / "engine.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        msg = f"The state directory {str(state)!r} can't be used: {error.strerror}. Set `SANDBOX_TOOLS_STATE_DIR`."
        raise ConfigError(msg, op="serve") from error

    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"Another engine runs on {str(state)!r}. Use it, or give this one another `--state-dir`."
            raise AlreadyRunningError(msg, op="serve") from None
        yield
    finally:
        os.close(lock)
