"""Python packages for a root file system: wheels chosen for the Python and the C library in it, not for those here."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from sandbox_tools.engine.building.apt import run
from sandbox_tools.errors import ConfigError, EngineError


def guest_requirements() -> list[str]:
    """What the guest needs, one `name==version` each, with all that they depend on."""
    text = (
        resources.files("sandbox_tools.engine.building").joinpath("guest-requirements.txt").read_text(encoding="utf-8")
    )
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def fetch_wheels(target: Path, *, python: str, glibc: int, wanted: Sequence[str | Path]) -> None:
    """Unpack wheels into a directory; nothing of them is run.

    What a package asks for under a condition ("only below Python 3.12") pip decides by the Python that runs it.

    Args:
        target: Made where it is missing. Scripts come into `bin` below it.
        python: The version they are for, such as `3.11`.
        glibc: The minor version of the root's glibc: 36 for 2.36.
        wanted: Words for pip: requirements and options.

    Raises:
        ConfigError: This Python has no pip.
        EngineError: pip failed: there is no such package or no wheel of it, or the index can't be reached.
    """
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc, 4, -1)]
    tags += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        run(
            [
                *pip,
                "--target",
                target,
                "--python-version",
                python,
                *(f"--platform={tag}" for tag in tags),
                "--only-binary=:all:",
                "--no-compile",
                *wanted,
            ]
        )
    except EngineError as error:
        if "No module named pip" not in error.stderr:
            raise

        msg = f"{sys.executable!r} has no pip. Run `{sys.executable} -m ensurepip` and try again."
        raise ConfigError(msg, op="setup") from error
