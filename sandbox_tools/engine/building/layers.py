"""Root file systems of one's own: the standard one with more in it, or a foreign one made fit; each made once."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from sandbox_tools.engine.building import fitting
from sandbox_tools.engine.building.apt import run
from sandbox_tools.engine.building.archives import unpack
from sandbox_tools.engine.building.roots import OnStep, make_once
from sandbox_tools.engine.building.wheels import fetch_wheels, guest_requirements
from sandbox_tools.errors import ConfigError, EngineError

# Raised whenever what is made of the same ingredients changes.
_RECIPE = "2"

_PINNABLE = re.compile(r"[0-9][0-9A-Za-z.!+-]*")

# The tree lies on the host as well, where these would be programs that run with the rights of their owner, and devices.
_HARMLESS = (
    ("-type", "f", "-perm", "/6000", "-exec", "chmod", "ug-s", "{}", "+"),
    ("(", "-type", "b", "-o", "-type", "c", "-o", "-type", "p", "-o", "-type", "s", ")", "-delete"),
)


def foreign_root(
    templates_dir: Path, source: Path, *, runsc: Path, guest: Path, standard: Path, on_step: OnStep
) -> Path:
    """A root file system out of a directory or an archive, with what the guest needs; made if it is not there yet.

    Args:
        source: The directory or archive.
        standard: The standard root file system; tini is taken from it.

    Raises:
        ConfigError: It can't be read, or lacks what can't be added; the message says what to do.
        EngineError: A step failed.
    """
    on_step("Reading the image", 0.0)
    name = digest("foreign", platform.machine(), _content(source), *guest_requirements())

    def make(partial: Path) -> None:
        root = partial / "root"
        root.mkdir(mode=0o755)
        on_step("Unpacking the image", 0.05)
        if source.is_dir():
            _copy_tree(source, root)
        else:
            unpack(source, root, lambda share: on_step("Unpacking the image", 0.05 + 0.4 * share))
        for what in _HARMLESS:
            run(["find", root, "-xdev", *what])
        on_step("Installing what the guest needs", 0.5)
        try:
            fitting.fit_out(runsc, root, guest=guest, tini=standard / "usr/bin/tini-static")
        finally:
            # Code of the image has run, which may have made new ones.
            for what in _HARMLESS:
                run(["find", root, "-xdev", *what])

    return make_once(templates_dir, name, make, on_step)


def with_requirements(templates_dir: Path, base: Path, lines: Sequence[str], *, runsc: Path, on_step: OnStep) -> Path:
    """A root file system with Python packages added to another one; what that has stays as it is.

    Unchanged files are shared with `base`, by hard links.

    Args:
        base: A finished root file system.
        lines: Of a requirements list.

    Raises:
        EngineError: They can't be had, or clash with what is there; pip's words say which.
    """

    def make(partial: Path) -> None:
        fit = fitting.look(runsc, base)
        on_step("Downloading Python packages", 0.1)
        stage = partial / "stage"
        stage.mkdir()
        (partial / "requirements.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        pins = [f"{each}=={version}\n" for each, version in fit.have.items() if _PINNABLE.fullmatch(version)]
        (partial / "constraints.txt").write_text("".join(pins), encoding="utf-8")
        wanted: list[str | Path] = ["-r", partial / "requirements.txt", "-c", partial / "constraints.txt"]
        try:
            fetch_wheels(stage / "wheels", python=fit.version, glibc=fit.glibc, wanted=wanted)
        except EngineError as error:
            msg = (
                f"The requirements can't be installed: {error.stderr or error.message}\nThey must be had as wheels for "
                f"Python {fit.version}, and agree with the packages that are there, which stay as they are."
            )
            raise EngineError(
                msg, argv=error.argv, exit_code=error.exit_code, stderr=error.stderr, op="build"
            ) from error
        on_step("Installing Python packages", 0.5)
        run(["cp", "--archive", "--link", base, partial / "root"])
        fitting.add(runsc, partial / "root", stage, fit)

    return make_once(templates_dir, digest("requirements", base.name, *lines), make, on_step)


def digest(*ingredients: str) -> str:
    """The name of what is made of these."""
    return hashlib.sha256("\0".join((_RECIPE, *ingredients)).encode()).hexdigest()[:16]


def _copy_tree(source: Path, root: Path) -> None:
    if root.is_relative_to(source.resolve()):
        msg = f"{str(source)!r} holds the templates themselves. Give a directory that is a root file system only."
        raise ConfigError(msg, op="build")
    if not (source / "usr").is_dir():
        msg = f"{str(source)!r} has no `usr`, so it is no root file system. Give the directory that has."
        raise ConfigError(msg, op="build")
    try:
        run(["cp", "--archive", "--no-preserve=xattr", "--reflink=auto", "--one-file-system", f"{source}/.", root])
    except EngineError as error:
        msg = f"{str(source)!r} can't be copied: {error.stderr}. Make it readable, or build as root."
        raise ConfigError(msg, op="build") from error
    run(["find", f"{root}/dev", "-mindepth", "1", "-delete"] if (root / "dev").is_dir() else ["true"])


def _content(source: Path) -> str:
    """A digest of an archive, or of all that is in a directory.

    Raises:
        ConfigError: It is not there, or can't be read.
    """
    total = hashlib.sha256()
    try:
        if not source.is_dir():
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        for path in _walk(source):
            status = path.lstat()
            fields: list[object] = [path.relative_to(source), status.st_mode, status.st_uid, status.st_gid]
            if stat.S_ISREG(status.st_mode):
                with path.open("rb") as file:
                    fields += [int(status.st_mtime), hashlib.file_digest(file, "sha256").hexdigest()]
            elif stat.S_ISLNK(status.st_mode):
                fields.append(os.readlink(path))
            total.update(repr(fields).encode())
    except OSError as error:
        msg = f"{str(source)!r} can't be read: {error.strerror} ({error.filename}). Give a file or directory that can."
        raise ConfigError(msg, op="build") from error
    return total.hexdigest()


def _walk(directory: Path) -> Iterable[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, directories, files in os.walk(directory, onerror=refuse):
        directories.sort()
        yield from (Path(parent, name) for name in sorted([*directories, *files]))
