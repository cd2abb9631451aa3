"""Root file systems of templates: made once from the machine's own apt sources, then never changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sandbox_tools.engine.building.apt import (
    USE_A_CLOUD,
    base_source,
    debian_codename,
    debian_sources,
    run,
    unpack,
)
from sandbox_tools.engine.building.install import make_directory
from sandbox_tools.engine.building.wheels import fetch_wheels, guest_requirements
from sandbox_tools.engine.images.snapshots import sync
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


def build_root(templates_dir: Path, on_step: OnStep, packages: Sequence[str] = ()) -> Path:
    """The root file system for this release and these packages, built if it is not there yet.

    It takes a minute, and blocks. A second process that asks for the same one waits for the first.

    Args:
        templates_dir: Where templates live; roots are kept in `roots` below it, each under the digest of its recipe.
        on_step: Told how far it is.
        packages: Debian packages that it has beside the usual ones.

    Raises:
        ConfigError: This machine lacks something that is needed; the message says what.
        EngineError: A command failed, such as a download.
    """
    codename = _codename()
    every = (*PACKAGES, *sorted(set(packages) - set(PACKAGES)))

    def make(partial: Path) -> None:
        _build(partial, codename, every, on_step)

    return make_once(templates_dir, _digest(codename, every), make, on_step)


def make_once(templates_dir: Path, name: str, make: Callable[[Path], None], on_step: OnStep) -> Path:
    """The root file system of that name, made if it is not there yet; raises as `make` does.

    Args:
        name: A digest of all that decides what is in it.
        make: Makes it as `root` in the directory that it is given, and may leave there what it likes.
        on_step: Told how far it is.
    """
    roots = templates_dir / "roots"
    finished = roots / name
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
            make(partial)
            on_step("Writing to disk", 0.95)
            run(["sync", "--file-system", partial / "root"])
            (partial / "root").rename(finished)
            sync(roots)
        finally:
            remove_tree(partial)
    on_step("The root file system is ready", 1.0)

    return finished


def find_root(templates_dir: Path) -> Path | None:
    """The root file system that `build_root` would give without building. None: it would have to build."""
    root = templates_dir / "roots" / _digest(_codename(), PACKAGES)
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


def _digest(codename: str, packages: Sequence[str]) -> str:
    recipe = [codename, platform.machine(), *packages, *UNWANTED, *HOOKS, *guest_requirements()]
    return hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]


def _build(partial: Path, codename: str, wanted: Sequence[str], on_step: OnStep) -> None:
    root = partial / "root"
    on_step("Installing Debian packages", 0.02)
    archive = _debian(partial, codename, wanted)

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


def _debian(partial: Path, codename: str, wanted: Sequence[str]) -> Path:
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
            f"--include={','.join(wanted)}",
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
    packages = root / "usr/local/lib" / python.name / "dist-packages"
    version = python.name.removeprefix("python")
    fetch_wheels(packages, python=version, glibc=_glibc_minor(root), wanted=["--no-deps", *guest_requirements()])

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
