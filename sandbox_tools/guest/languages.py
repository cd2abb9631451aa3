"""The languages that code can be in here: which kernel runs each, and how that is started and held."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sandbox_tools.guest.scripts import BashScript, DenoScript, PythonScript, Script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PYTHON = "python"

CONNECTION_FILE = "{connection_file}"
"""Stands in a command for the path of the connection file, as in a Jupyter kernelspec."""

ALIASES = {"py": "python", "python3": "python", "js": "javascript", "ts": "typescript", "sh": "bash"}

FROM_STDIN = "import sys; sys.path = [*filter(None, sys.path)]; exec(compile(sys.stdin.read(), '<sandbox>', 'exec'))"
"""A program that reads itself: the kernel's user can't read the guest's files, and no directory is put in its path."""

LOAD = """\
import sys, types
def load(name, source, file):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, file, "exec"), module.__dict__)
"""


class UnknownLanguageError(Exception):
    """Raised for a language that has no kernel here; the text names those that have one."""

    def __init__(self, language: str, available: list[str]) -> None:
        super().__init__(f"The language {language!r} is not available here. Use one of: {', '.join(available)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How code in one language is run: a Jupyter kernel that somebody else maintains, and the reins to hold it."""

    name: str
    """As the wire shows it."""
    command: tuple[str, ...]
    """With `CONNECTION_FILE` where the path belongs."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What the kernel needs beside a login's environment."""
    program: str = ""
    """What the command reads from its standard input."""
    transport: Literal["ipc", "tcp"] = "ipc"
    interrupt: Literal["signal", "message"] = "signal"
    """`message`: by `interrupt_request`, since a signal would end the kernel."""
    script: Script | None = None
    """None: nothing can be said to the kernel in its own language, so a call's variables can't be set."""
    heap_limit: Callable[[int], Mapping[str, str]] = lambda _: {}
    """The environment that keeps the runtime's own heap below so many bytes, so that it ends by itself in time."""


def canonical(name: str) -> str:
    """The one spelling of a language's name, known here or not."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


def find(name: str, home: Path) -> Language:
    """The language of that name or alias, in any case of letters.

    Args:
        name: As a caller wrote it.
        home: Of the account that kernels run as, where it may have kernelspecs of its own.

    Raises:
        UnknownLanguageError: It has no kernel here.
    """
    wanted = canonical(name)
    make = OWN.get(wanted)
    found = make() if make else _from_kernelspec(wanted, home)
    if found is None:
        raise UnknownLanguageError(name, available(home))

    return found


def available(home: Path) -> list[str]:
    """The names of the languages that have a kernel here, those that the guest itself can hold first."""
    own = [name for name, make in OWN.items() if make() is not None]
    return [*own, *sorted({language for language, _, _ in _kernelspecs(home)} - OWN.keys())]


@functools.cache
def _program(**modules: str) -> str:
    """What to read from standard input: the files of the guest, by the modules' names, of which the last one runs."""
    files = [(name, Path(__file__).with_name(f"{file}.py")) for name, file in modules.items()]
    loads = [f"load({name!r}, {path.read_text(encoding='utf-8')!r}, {str(path)!r})\n" for name, path in files]
    return f"{LOAD}{''.join(loads)}sys.modules[{files[-1][0]!r}].run()\n"


def _python() -> Language:
    return Language(
        name=PYTHON,
        command=(
            sys.executable,
            "-c",
            FROM_STDIN,
            "-f",
            CONNECTION_FILE,
            "--HistoryManager.enabled=False",  # no SQLite file, and no thread that writes it
            "--InteractiveShell.colors=nocolor",  # tracebacks are read by a model
            "--InteractiveShellApp.exec_PYTHONSTARTUP=False",
        ),
        program=_program(_sandbox_kernel="in_kernel", _sandbox_results="in_results", _sandbox="in_python"),
        # Each thread's own arena would reserve 64 MiB of what is limited, and never fill it.
        heap_limit=lambda _: {"MALLOC_ARENA_MAX": "2"},
        script=PythonScript(),
    )


def _bash() -> Language | None:
    if not (shutil.which("bash") and importlib.util.find_spec("bash_kernel")):
        return None

    return Language(
        name="bash",
        command=(sys.executable, "-c", FROM_STDIN, "-f", CONNECTION_FILE),
        # Its terminal is seen by its kernel only: colours and moving cursors would end up in the text.
        env={"PS1": "$", "TERM": "dumb"},
        program=_program(_sandbox_kernel="in_kernel", _sandbox="in_bash"),
        script=BashScript(),
    )


def _deno(name: str) -> Language | None:
    deno = shutil.which("deno") or shutil.which("deno", path=sysconfig.get_path("scripts"))
    if deno is None:
        return None

    return Language(
        name=name,
        command=(deno, "jupyter", "--kernel", "--conn", CONNECTION_FILE),
        env={"NO_COLOR": "1", "DENO_NO_UPDATE_CHECK": "1"},
        transport="tcp",  # its own ZeroMQ knows no other
        interrupt="message",
        # Past its heap V8 ends its process in good order; what lies outside of the heap, `RLIMIT_AS` sees.
        # A quarter is left to other kernels: at the machine's own limit all of the sandbox would stand still, or end.
        heap_limit=lambda limit: {"DENO_V8_FLAGS": f"--max-old-space-size={limit * 3 // 4 >> 20}"},
        script=DenoScript(),
    )


OWN: dict[str, Callable[[], Language | None]] = {
    PYTHON: _python,
    "javascript": lambda: _deno("javascript"),
    "typescript": lambda: _deno("typescript"),
    "bash": _bash,
}
"""The languages that the guest knows how to hold. A template has them if it has what runs them."""


def _from_kernelspec(wanted: str, home: Path) -> Language | None:
    for language, command, spec in _kernelspecs(home):
        if language == wanted:
            return Language(
                name=language,
                command=command,
                env=dict(spec.env),
                transport="tcp",  # what every kernel knows
                interrupt="message" if spec.interrupt_mode == "message" else "signal",
            )

    return None


def _kernelspecs(home: Path) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Language, command and specification of each kernel that is installed where Jupyter looks for them."""
    from jupyter_client.kernelspec import KernelSpecManager  # only here: it costs memory
    from jupyter_core.paths import jupyter_path

    directories = [str(home / ".local/share/jupyter/kernels"), *jupyter_path("kernels")]
    manager = KernelSpecManager(kernel_dirs=directories, ensure_native_kernel=False)
    for name in sorted(manager.find_kernel_specs()):
        try:
            spec = manager.get_kernel_spec(name)
        except Exception:  # one that is broken must not hide the others
            continue
        yield spec.language.lower(), tuple(spec.argv), spec
