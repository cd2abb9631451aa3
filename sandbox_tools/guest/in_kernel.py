"""Runs inside each kernel that is a Python process: starts it, and holds the guest's reins there.

The process reads this file's text from its standard input and keeps it as the module `_sandbox`: the kernel's user
cannot read the guest's own files, and no path of the guest is put before the user's.
"""

from __future__ import annotations

import io
import os
import resource
import sys
import threading
from typing import TYPE_CHECKING, Any

from ipykernel.iostream import OutStream
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

HELD = 512 * 1024
"""Characters of output after which the code waits until they are sent."""

PIECE = 64 * 1024
"""Characters in one message at most; a thousand messages may wait for the guest."""

_lent: dict[str, str | None] = {}


class PacedStream(OutStream):  # type: ignore[misc]  # ipykernel is not typed
    """Standard output that waits for its reader: code that prints without end slows down instead of filling memory.

    What it overrides lies below `write`, because IPython puts a `write` of its own on the instance for each cell.
    """

    flush_timeout = 3600  # seconds to wait for a slow reader; an interrupt ends it at once

    def _schedule_flush(self) -> None:
        super()._schedule_flush()
        with self._buffer_lock:
            held = sum(buffer.tell() for buffer in self._buffers.values())
        if held >= HELD:
            self.flush()

    def _flush_buffers(self) -> Iterator[tuple[Any, str]]:
        for parent, text in super()._flush_buffers():
            for start in range(0, len(text), PIECE):
                yield parent, text[start : start + PIECE]


class Forgetful(dict[int, list[Any]]):
    """Takes the place of IPython's record of every cell's output, which would grow for as long as the kernel lives."""

    def __missing__(self, cell: int) -> list[Any]:
        """A list that nobody keeps."""
        return []


def run_kernel(kind: type) -> None:
    """Runs a kernel of that class until it is told to end."""
    app: Any = IPKernelApp.instance(kernel_class=kind)
    app.initialize(sys.argv[1:])
    tame_output(app)
    app.start()


def run_python() -> None:
    """Runs a kernel for Python."""
    run_kernel(IPythonKernel)


def tame_output(app: Any) -> None:
    """Makes output wait for the guest, where ZeroMQ would drop what is too much, and forgets it once it is sent."""
    if app.shell is not None:
        app.shell.history_manager.outputs = Forgetful()
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


def limit_memory(fillable: int) -> None:
    """Lets this process fill so many bytes: past that the code gets a `MemoryError`, and the sandbox lives.

    What is mapped and not filled does not count, and libraries map a multiple of what they fill. Only the soft limit
    is set: a program that reserves address space, as Node does, may raise it again.
    """
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped, filled = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (fillable + mapped - filled, hard))


def warm_up() -> None:
    """Imports what most code imports, and lets it fill its caches, so that every sandbox of the template has that."""
    import matplotlib.pyplot as plt
    import pandas

    pandas.DataFrame({"a": [1]})._repr_html_()
    figure = plt.figure()
    figure.gca().plot([0, 1], label="a")
    figure.legend()
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)


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
