"""Root file systems of templates: made once from the machine's own apt sources, then never changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from sandbox_tools.engine.apt import (
    USE_A_CLOUD,
    base_source,
    debian_codename,
    debian_sources,
    run,
    unpack,
)
from sandbox_tools.engine.install import make_directory
from sandbox_tools.engine.snapshots import sync
from sandbox_tools.errors import ConfigError, EngineError

OnStep = Callable[[str, float], None]
"""Told what is being done now, and the share of the whole that lies behind, from 0 to 1."""

PACKAGES = (
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "git",
    "procps",
    "python-is-python3",
    "python3",
    "python3-pip",
    "tini",
)

UNWANTED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")

HOOKS = (
    'chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash user',
    r'printf "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 sandbox\n" >"$1/etc/hosts"',
    'echo sandbox >"$1/etc/hostname"',
    # A sandbox must learn nothing about this machine: neither its mirrors and proxies (which may hold passwords) ...
    'rm -f "$1/etc/apt/sources.list" "$1"/etc/apt/sources.list.d/* "$1/etc/apt/apt.conf.d/99mmdebstrap"',
    # ... nor its resolver.
    'rm -f "$1/etc/resolv.conf"',
    # The tree lies on the host as well, where these would be old programs that run with the rights of its owner.
    'find "$1" -xdev -type f -perm /6000 -exec chmod ug-s {} +',
)
"""Run by mmdebstrap at its end; `$1` is the new root."""

CARRIED_OVER = re.compile(r'Acquire::(?:https?|Check|Retries|ForceIPv)[^\n]*";$')
"""The apt settings that decide whether this machine can download at all: proxies, certificates, clocks."""


def build_root(templates_dir: Path, on_step: OnStep) -> Path:
    """The root file system for this release and these packages, built if it is not there yet.

    It takes a minute, and blocks. A second process that asks for the same one waits for the first.

    Args:
        templates_dir: Where templates live; roots are kept in `roots` below it, each under the digest of its recipe.
        on_step: Told how far it is.

    Raises:
        ConfigError: This machine lacks something that is needed; the message says what.
        EngineError: A command failed, such as a download.
    """
    roots = templates_dir / "roots"
    codename = _codename()
    finished = roots / _digest(codename)
    if finished.exists():
        return finished

    make_directory(roots)
    with locked(roots / ".lock", on_wait=lambda: on_step("Waiting for another process that builds it", 0.0)):
        if finished.exists():
            return finished

        # Whoever holds the lock is the only builder, so what lies here was left behind by one that died.
        for left in roots.glob(".partial-*"):
            remove_tree(left)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=roots))
        try:
            _build(partial, codename, on_step)
            (partial / "root").rename(finished)
            sync(roots)
        finally:
            remove_tree(partial)
    on_step("The root file system is ready", 1.0)

    return finished


def find_root(templates_dir: Path) -> Path | None:
    """The root file system that `build_root` would give without building. None: it would have to build."""
    root = templates_dir / "roots" / _digest(_codename())
    return root if root.exists() else None


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, also directories that their owner may not write to."""

    def unlocked(remove: Callable[[str], object], failed: str, _: object) -> None:
        parent = Path(failed).parent
        parent.chmod(parent.stat().st_mode | stat.S_IRWXU)
        remove(failed)

    shutil.rmtree(path, onerror=unlocked)


def _codename() -> str:
    own = debian_codename()
    if own:
        return own

    with tempfile.TemporaryDirectory() as scratch:
        return base_source(debian_sources(Path(scratch))).codename


def _digest(codename: str) -> str:
    recipe = [codename, platform.machine(), *PACKAGES, *UNWANTED, *HOOKS, *_requirements()]
    return hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]


def _requirements() -> list[str]:
    text = resources.files("sandbox_tools.engine").joinpath("guest-requirements.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _build(partial: Path, codename: str, on_step: OnStep) -> None:
    root = partial / "root"
    on_step("Installing Debian packages", 0.02)
    archive = _debian(partial, codename)

    on_step("Unpacking the root file system", 0.55)
    root.mkdir(mode=0o755)
    owners = "--numeric-owner" if os.geteuid() == 0 else "--no-same-owner"
    run(["tar", "--extract", "--preserve-permissions", owners, "--exclude=./dev/*", "-C", root, "-f", archive])
    archive.unlink()

    on_step("Installing Python packages", 0.6)
    packages = _python_packages(root)

    on_step("Compiling Python packages", 0.8)
    enter = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
    inside = Path("/") / packages.relative_to(root)
    run([*enter, "chroot", root, "/usr/bin/python3", "-I", "-m", "compileall", "-q", inside])

    on_step("Writing to disk", 0.95)
    run(["sync", "--file-system", root])


def _debian(partial: Path, codename: str) -> Path:
    sources = debian_sources(partial / "lists")
    suites = (codename, f"{codename}-updates", f"{codename}-security")
    lines = [source.line() for source in sources if source.codename in suites]
    if not lines:
        msg = f"This machine is Debian {codename!r}, but its apt sources do not name it. Add it.\n{USE_A_CLOUD}"
        raise ConfigError(msg, op="setup")

    source_list = partial / "sources.list"
    source_list.write_text("\n".join(lines))
    settings = run(["apt-config", "dump"]).splitlines()
    apt_conf = partial / "apt.conf"
    apt_conf.write_text("".join(f"{line}\n" for line in settings if CARRIED_OVER.match(line)))

    archive = partial / "root.tar"
    command = _mmdebstrap(partial)
    run(
        [
            *command,
            f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            f"--aptopt={apt_conf}",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in UNWANTED),
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            *(f"--customize-hook={hook}" for hook in HOOKS),
            codename,
            archive,
            source_list,
        ]
    )
    return archive


def _mmdebstrap(partial: Path) -> list[str | Path]:
    if os.geteuid() != 0 and not shutil.which("newuidmap"):
        msg = (
            "Building a root file system as an ordinary user needs `newuidmap`. Ask an administrator for "
            f"`apt-get install uidmap`, or run `sandbox-tools setup` as root.\n{USE_A_CLOUD}"
        )
        raise ConfigError(msg, op="setup")

    if not shutil.which("mmdebstrap") and os.geteuid() == 0:
        run(["apt-get", "--quiet", "update"])
        run(["apt-get", "--quiet", "--yes", "--no-install-recommends", "install", "mmdebstrap"])
    if shutil.which("mmdebstrap"):
        return ["mmdebstrap"]

    base = base_source(debian_sources(partial / "lists"))
    files = unpack("mmdebstrap", [base.line()], partial / "mmdebstrap")
    return ["perl", files / "usr/bin/mmdebstrap"]


def _python_packages(root: Path) -> Path:
    python = max((root / "usr/bin").glob("python3.*[0-9]"), key=lambda path: int(path.name.split(".")[1]))
    glibc = _glibc_minor(root)
    # Wheels are chosen for the Python and the C library in the root, not for those that run this.
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc, 4, -1)]
    tags += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]
    packages = root / "usr/local/lib" / python.name / "dist-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        run(
            [
                *pip,
                "--target",
                packages,
                "--python-version",
                python.name.removeprefix("python"),
                *(f"--platform={tag}" for tag in tags),
                "--only-binary=:all:",
                "--no-compile",
                "--no-deps",
                *_requirements(),
            ]
        )
    except EngineError as error:
        if "No module named pip" not in error.stderr:
            raise

        msg = f"{sys.executable!r} has no pip. Run `{sys.executable} -m ensurepip` and try again."
        raise ConfigError(msg, op="setup") from error

    # Programs are kept; scripts begin with the path of the interpreter that installed them, which is not in the root.
    for file in (packages / "bin").glob("*"):
        with file.open("rb") as opened:
            program = opened.read(4) == b"\x7fELF"
        if program:
            file.rename(root / "usr/local/bin" / file.name)
    shutil.rmtree(packages / "bin", ignore_errors=True)
    return packages


def _glibc_minor(root: Path) -> int:
    status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^Package: libc6\n(?:.+\n)*?Version: 2\.(\d+)", status, re.MULTILINE)
    if not found:
        msg = "The new root file system has no `libc6`. Report this with the names of your apt sources."
        raise EngineError(msg, op="setup")

    return int(found[1])


@contextmanager
def locked(path: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a file lock; the kernel lets go of it when the holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
