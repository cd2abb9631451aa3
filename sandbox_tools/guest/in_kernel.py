"""Runs inside each kernel that is a Python process: starts it, and makes its output wait for the guest.

The process reads the text of this file, and of the others that begin with `in_`, from its standard input: the kernel's
user cannot read the guest's own files, and no path of the guest is put before the user's.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from ipykernel.iostream import OutStream
from ipykernel.kernelapp import IPKernelApp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELD = 512 * 1024
"""Characters of output after which the code waits until they are sent."""

PIECE = 64 * 1024
"""Characters in one message at most; a thousand messages may wait for the guest."""


class PacedStream(OutStream):  # type: ignore[misc]  # ipykernel is not typed
    """Standard output that waits for its reader: code that prints without end slows down instead of filling memory.

    What it overrides lies below `write`, because IPython puts a `write` of its own on the instance for each cell.
    """

    flush_timeout = 3600  # seconds to wait for a slow reader; an interrupt ends it at once
    _written = 0
    """How often something was written; what is counted here is in the buffers or was taken out of them."""
    _flushed = 0
    """The `_written` of which all has been sent."""

    def flush(self) -> None:
        """Returns when all is sent. That takes a trip to another thread and back, so only if there is something."""
        if self._flushed != self._written:
            super().flush()

    def _flush(self) -> None:
        written = self._written
        super()._flush()
        self._flushed = written

    def _schedule_flush(self) -> None:
        super()._schedule_flush()
        with self._buffer_lock:
            self._written += 1
            held = sum(buffer.tell() for buffer in self._buffers.values())
        if held >= HELD:
            self.flush()

    def _flush_buffers(self) -> Iterator[tuple[Any, str]]:
        for parent, text in super()._flush_buffers():
            for start in range(0, len(text), PIECE):
                yield parent, text[start : start + PIECE]


class Application(IPKernelApp):  # type: ignore[misc]
    """One that reads requests where it runs them: a thread for subshells in between only takes time."""

    def init_control(self, context: Any) -> None:
        """Makes the sockets, and leaves that thread away."""
        super().init_control(context)
        self.shell_channel_thread = None


def run_kernel(kind: type, prepare: Callable[[Any], None] = lambda _: None) -> None:
    """Runs a kernel of that class until it is told to end; `prepare` gets the application before it starts."""
    app: Any = Application.instance(kernel_class=kind)
    app.initialize(sys.argv[1:])
    tame_output(app)
    prepare(app)
    app.start()


def tame_output(app: Any) -> None:
    """Makes output wait for the guest, where ZeroMQ would drop what is too much, and forgets it once it is sent."""
    for stream in (sys.stdout, sys.stderr):
        stream.__class__ = PacedStream

    thread = app.iopub_thread
    schedule = thread.schedule

    def at_once_or_scheduled(action: Callable[[], None]) -> None:
        if threading.current_thread() is thread.thread:
            action()
        else:
            schedule(action)

    # That thread would else send itself a message for each piece of output, through a queue that only it empties:
    # when the queue is full it waits for itself. Also, a flush that has returned has then really been sent.
    thread.schedule = at_once_or_scheduled

    def keep_everything() -> None:
        thread.socket.xpub_nodrop = True

    # A socket belongs to its thread. Its queue keeps its length: to shorten it under way can block it for good.
    schedule(keep_everything)
