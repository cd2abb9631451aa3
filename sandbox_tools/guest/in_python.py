"""Runs inside each Python kernel, as its module `_sandbox`: the reins that the guest holds there."""

from __future__ import annotations

import io
import os
import resource
import signal
import socket
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from _sandbox_kernel import run_kernel
from _sandbox_results import chart, register
from ipykernel.ipkernel import IPythonKernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_lent: dict[str, str | None] = {}


class Python(IPythonKernel):  # type: ignore[misc]  # ipykernel is not typed
    """IPython's kernel as it is where there is no thread for subshells."""

    _supports_kernel_subshells = False

    def _publish_status(self, status: str, *rest: Any, **more: Any) -> None:
        # That it is busy the guest knows, who asked for it.
        if status != "busy":
            super()._publish_status(status, *rest, **more)

    def start(self) -> None:
        """Begins to take requests."""
        super().start()
        # Code that awaits is interrupted only where this names the thread that runs it, and where a signal wakes the
        # loop: what its handler asks of the loop would wait for the next event.
        self.shell_channel_thread = SimpleNamespace(parent_thread=threading.main_thread())
        self._woken, self._waker = socket.socketpair()
        for each in (self._woken, self._waker):
            each.setblocking(False)
        self.io_loop.asyncio_loop.add_reader(self._woken, self._woken.recv, 4096)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)


def run() -> None:
    """Runs the kernel until it is told to end."""
    run_kernel(Python, _prepare)


def _prepare(app: Any) -> None:
    app.shell.history_manager.outputs = Forgetful()
    register(app.shell)


class Forgetful(dict[int, list[Any]]):
    """Takes the place of IPython's record of every cell's output, which would grow for as long as the kernel lives."""

    def __missing__(self, cell: int) -> list[Any]:
        """A list that nobody keeps."""
        return []


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
    chart(figure)
    plt.close(figure)


def touch() -> None:
    """Does what most code does, in little, and shows and prints something."""
    import pandas
    from IPython.display import display

    display(pandas.DataFrame({"a": [1, 2]}).a.sum())
    sys.stdout.write("\n")


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
