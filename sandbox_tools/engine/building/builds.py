"""What a template of one's own is made from, as plain data that has been checked; nothing is read or done here."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sandbox_tools.errors import ConfigError
from sandbox_tools.models import DEFAULT_TEMPLATE

BUILT_IN = frozenset({"base", DEFAULT_TEMPLATE})
"""The names of the default template, which is there without having been built."""

READY_SECONDS = 60.0
"""How long the check of a start command is repeated, unless told otherwise."""

LEAST_MEMORY_MB = 512
"""Below, the guest and a kernel with pandas do not come up."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEBIAN = re.compile(r"[a-z0-9][a-z0-9+.-]+")

# What these name is not in the list itself, so that a change of it would go unseen.
_ELSEWHERE = re.compile(r"(-r|-c|-e|--requirement|--constraint|--editable)\b|[./~]|file:|.*@\s*file:")


class Recipe(BaseModel):
    """One template. What is None or empty was not asked for.

    Attributes:
        requirements: Lines of a pip requirements list.
        packages: Debian packages beside those of the standard root file system.
        rootfs: A directory that is the root file system instead of the standard one.
        tarball: An archive of one: a plain tar, or what `docker save` writes, or an OCI image layout.
        start: A shell command that `user` runs in every sandbox from its beginning.
        ready: A shell command that ends with 0 as soon as the template is ready.
        ready_seconds: How long that may take.
        memory_mb: Memory of each sandbox. None: 2048.
        cpu: Cores' worth of CPU time that each may use. None: all there are.
        disk_mb: What each may write to its files, in MB; rounded up, as `Bounds.disk_mb`. None: 10240.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    requirements: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    rootfs: Path | None = None
    tarball: Path | None = None
    start: str | None = None
    ready: str | None = None
    ready_seconds: float = READY_SECONDS
    memory_mb: int | None = None
    cpu: float | None = None
    disk_mb: int | None = None


def is_name(name: str) -> bool:
    """Whether a template of one's own could be called so."""
    return _NAME.fullmatch(name) is not None and name not in BUILT_IN


def check_name(name: str) -> str:
    """The name of a template of one's own.

    Raises:
        ConfigError: It can't be one, or is a built-in template's.
    """
    if not _NAME.fullmatch(name):
        msg = f"Invalid template name: {name[:200]!r}. Use up to 64 letters, digits, `.`, `_` and `-`, and no tag."
        raise ConfigError(msg, op="build")
    if name in BUILT_IN:
        msg = f"{name!r} is a built-in template, which stays as it is. Choose another name."
        raise ConfigError(msg, op="build")
    return name


def requirement_lines(text: str) -> tuple[str, ...]:
    """The lines of a requirements list that say something.

    Raises:
        ConfigError: One names another file or directory, whose changes would go unseen.
    """
    joined = re.sub(r"\\\n", " ", text)
    lines = tuple(line for each in joined.splitlines() if (line := re.sub(r"(^|\s+)#.*$", "", each).strip()))
    for line in lines:
        if _ELSEWHERE.match(line):
            msg = f"The requirement {line!r} names something outside the list. Write packages, of an index, into it."
            raise ConfigError(msg, op="build")
    return lines


def checked(recipe: Recipe) -> Recipe:
    """The recipe, its packages in order and none twice.

    Raises:
        ConfigError: It contradicts itself or can't be followed; the message says what to change.
    """
    check_name(recipe.name)
    problem = _problem(recipe)
    if problem is not None:
        raise ConfigError(problem, op="build")
    return recipe.model_copy(update={"packages": tuple(sorted(set(recipe.packages)))})


def _problem(recipe: Recipe) -> str | None:
    foreign = recipe.rootfs or recipe.tarball
    if recipe.rootfs and recipe.tarball:
        return "A template has one root file system. Give `--rootfs` or `--tarball`, not both."
    if foreign and recipe.packages:
        return f"Debian packages can't be added to {str(foreign)!r}. Install them in the image, or leave it out."
    for package in recipe.packages:
        if not _DEBIAN.fullmatch(package):
            return f"{package!r} can't be the name of a Debian package. Separate several with commas."
    if recipe.memory_mb is not None and recipe.memory_mb < LEAST_MEMORY_MB:
        return f"{recipe.memory_mb} MB are not enough for a sandbox. Give it {LEAST_MEMORY_MB} or more."
    if recipe.cpu is not None and not 0.05 <= recipe.cpu <= 1024:
        return f"{recipe.cpu:g} cores can't be given. Give 0.05 or more, such as 0.5 or 2."
    if recipe.disk_mb is not None and not 1 <= recipe.disk_mb <= 1 << 30:
        return (
            f"A disk of {recipe.disk_mb} MB can't be given. Give 1 to {1 << 30}; it becomes whole GiB, and as many as "
            "the sandbox's memory and processes need (8 beside 2 GB)."
        )
    if recipe.ready_seconds <= 0:
        return "The ready check needs more than 0 seconds."
    if recipe.start is not None and not recipe.start.strip():
        return "The start command is empty. Leave it out, or give one."
    if recipe.ready is not None and not recipe.ready.strip():
        return "The ready command is empty. Leave it out, or give one."
    return None
