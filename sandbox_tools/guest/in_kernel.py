"""Runs inside each Python kernel, before the user's code: the reins that the guest holds there.

The guest sends this file's text to the kernel, which keeps it as the module `_sandbox`: the kernel's user cannot read
the guest's own files, and no path of the guest is put before the user's.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from ipykernel.iostream import OutStream
from IPython.core.getipython import get_ipython

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PIECE = 1 << 20
"""Characters of output that are held, or sent in one message, at most."""

QUEUED = 16
"""Messages that wait in the kernel's socket at most."""

_lent: dict[str, str | None] = {}


class PacedStream(OutStream):  # type: ignore[misc]  # ipykernel is not typed
    """Standard output that waits for its reader: code that prints without end slows down instead of filling memory."""

    flush_timeout = 3600  # seconds to wait for a slow reader; an interrupt ends it at once
    held = 0

    def write(self, string: str) -> int:
        """Writes in pieces, and waits for each full one to be sent."""
        if not isinstance(string, str) or len(string) <= PIECE:
            return self._paced(string)

        return sum(self._paced(string[start : start + PIECE]) for start in range(0, len(string), PIECE))

    def _paced(self, string: str) -> int:
        written: int = super().write(string)
        self.held += written
        if self.held >= PIECE:
            self.held = 0
            self.flush()

        return written


def pace_output() -> None:
    """Makes the kernel's output wait for the guest; ZeroMQ's own way would be to drop what is too much."""
    thread: Any = get_ipython().kernel.iopub_thread  # type: ignore[union-attr]

    def configure() -> None:
        thread.socket.xpub_nodrop = True
        thread.socket.sndhwm = QUEUED

    thread.schedule(configure)  # a socket belongs to its thread
    for stream in (sys.stdout, sys.stderr):
        stream.__class__ = PacedStream


def update_env(changed: Mapping[str, str], gone: Iterable[str]) -> None:
    """Sets and removes variables for good."""
    os.environ.update(changed)
    for name in gone:
        os.environ.pop(name, None)


def lend_env(env: Mapping[str, str]) -> None:
    """Sets variables until `return_env`."""
    for name, value in env.items():
        _lent.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def return_env() -> None:
    """Puts the variables that were lent back to what they were before."""
    while _lent:
        name, value = _lent.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def reseed() -> None:
    """Gives the generators of this process fresh entropy: sandboxes restored from one image must not share numbers."""
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "ssl" in sys.modules:
        sys.modules["ssl"].RAND_add(os.urandom(64), 64.0)
