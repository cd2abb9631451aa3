"""Files that are being written while somebody who needs them whole may begin: opening one waits until it is."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_tools.errors import EngineError

_NEAR = 512 << 20
"""Bytes that are still to be written when whoever waits may begin; 0.2 s where nothing else runs."""


class Held:
    """Files held by a lease each (fcntl(2)).

    The kernel takes a lease away from who does not give it up in time (`lease-break-time` in proc_sys_fs(5), 45 s). So
    the end of each file is written last, and only if there is time: what is read too early is too short, and known to
    be by its reader.

    Args:
        files: Descriptors of files that nobody else has open.
        size: Bytes that will be written to them.
        near: Called when it will not take long any more; never where the file system has no leases.
    """

    def __init__(self, files: Collection[int], size: int, near: Callable[[], None]) -> None:
        self._left = size
        self._near = near
        self._counting = threading.Lock()
        self._began: float | None = None
        self._seconds = _break_seconds() if all(_lease(fd) for fd in files) else 0.0

    def tell(self, written: int) -> None:
        """Say that so many bytes more are written."""
        with self._counting:
            self._left -= written
            if self._began is None and self._left <= _NEAR and self._seconds > 0:
                self._began = time.monotonic()
                self._near()

    def check(self) -> None:
        """Make sure that they are still held.

        Raises:
            EngineError: They may not be.
        """
        if self._began is not None and time.monotonic() - self._began > self._seconds:
            msg = "Opening the snapshot took too long, as this machine is busy. Resume it again."
            raise EngineError(msg, op="restore")


@contextmanager
def holding(files: Collection[int], size: int, near: Callable[[], None]) -> Iterator[Held]:
    """Hold files until their descriptors are closed; where that fails, they are cut to nothing. See `Held`."""
    try:
        held = Held(files, size, near)
        held.tell(0)
        yield held
    except BaseException:
        for fd in files:
            os.ftruncate(fd, 0)
        raise


def _break_seconds() -> float:
    return float(Path("/proc/sys/fs/lease-break-time").read_text()) - 1


def _lease(fd: int) -> bool:
    try:
        # Told of somebody who waits by a signal: this is one that ends nobody who does not care.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    return True
