"""Where a `runsc` waits that was started before it may begin: at the opening of its log, a pipe that nobody reads yet.

Its start takes as long as all that it does for a small verb, and can so go on beside another one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import TracebackType

_NAME = "gate"
_LOG = "--log="


class Gate:
    """One for one process, which is to have `path` as its log. Of a verb that ends well there is nothing in it.

    Args:
        directory: Of the container.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / _NAME
        self._fd: int | None = None

    def __enter__(self) -> Gate:
        """Shut, in place of one that a crash left."""
        self.path.unlink(missing_ok=True)
        os.mkfifo(self.path, 0o600)
        return self

    def open(self) -> None:
        """Let it go on."""
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)
        if self._fd is not None:
            os.close(self._fd)


def end_if_shut(pid: int) -> None:
    """End a process that waits at a gate; for when whoever could open it has died."""
    with contextlib.suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            gates = [each.removeprefix(_LOG) for each in argv if each.startswith(_LOG) and Path(each).name == _NAME]
            # Compared as files: a path may lead there by way of links.
            through = any(os.path.samefile(gate, fd) for gate in gates for fd in Path(f"/proc/{pid}/fd").iterdir())
            if gates and not through:
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)
