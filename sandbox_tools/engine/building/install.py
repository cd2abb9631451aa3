"""Finds `runsc`, or fetches it without touching the system; says in words why this machine can't run sandboxes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sandbox_tools.engine.building.apt import USE_A_CLOUD, base_source, debian_sources, run, unpack
from sandbox_tools.errors import ConfigError, EngineError, SandboxError
from sandbox_tools.paths import state_directory

MINIMUM_VERSION = 20240729
"""The first release that checkpoints and restores as this engine needs it, also for an ordinary user."""

MACHINES = ("x86_64", "aarch64")

VERSION = re.compile(r"\bversion (?:\S*\D)?(\d{8})(?:\.|\s|$)")
"""`runsc version release-20240729.0` from upstream, `runsc version 0.0~20240729.0` from Debian."""


@dataclass(frozen=True, kw_only=True)
class Runsc:
    """A `runsc` that is new enough."""

    path: Path
    version: int
    """Its release date as yyyymmdd."""


def find_runsc(state: Path | None = None) -> Runsc:
    """The first usable one of `SANDBOX_TOOLS_RUNSC`, `bin/runsc` in the state directory, and PATH.

    Args:
        state: The state directory. None: `paths.state_directory()`.

    Raises:
        ConfigError: There is none, or only older ones.
    """
    chosen = os.environ.get("SANDBOX_TOOLS_RUNSC")
    if chosen:
        try:
            return _checked(Path(chosen))
        except ConfigError as error:
            msg = f"{error.message} It is what `SANDBOX_TOOLS_RUNSC` names.\n{USE_A_CLOUD}"
            raise ConfigError(msg, op="setup") from None

    problem = "`runsc` (gVisor) is not installed."
    on_path = shutil.which("runsc")
    for path in ((state or state_directory()) / "bin/runsc", Path(on_path) if on_path else None):
        if path is None or not path.exists():
            continue

        try:
            return _checked(path)
        except ConfigError as error:
            problem = error.message.splitlines()[0]

    msg = (
        f"{problem} Run `sandbox-tools setup`, or install {MINIMUM_VERSION} or newer (Debian 12: package `runsc` of "
        f"`bookworm-backports`) on PATH.\n{USE_A_CLOUD}"
    )
    raise ConfigError(msg, op="setup")


def install_runsc(state: Path) -> Runsc:
    """The `runsc` that is there, else one put into the state directory from this machine's own apt sources.

    Safe against two processes at once: each fetches its own copy, and the last rename wins.

    Raises:
        ConfigError: It can't be had from this machine's sources.
    """
    try:
        return find_runsc(state)
    except ConfigError as error:
        if os.environ.get("SANDBOX_TOOLS_RUNSC") or not shutil.which("apt-get"):
            raise

        missing = error

    binaries = state / "bin"
    make_directory(state)
    make_directory(binaries)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=binaries) as scratch:
        base = base_source(debian_sources(Path(scratch)))
        failures = []
        # Debian 12 has a new enough one in its backports only, later releases have it in the release itself.
        for suite in (f"{base.codename}-backports", base.codename):
            attempt = Path(scratch) / suite
            try:
                fetched = unpack("runsc", [base.line(suite)], attempt) / "usr/bin/runsc"
                _checked(fetched)
            except SandboxError as error:
                failures.append(f"{suite}: {error.message.splitlines()[0]}")
                continue

            fetched.replace(binaries / "runsc")
            return _checked(binaries / "runsc")

    msg = f"{missing.message.splitlines()[0]} apt could not provide it ({'; '.join(failures)}).\n{USE_A_CLOUD}"
    raise ConfigError(msg, op="setup")


def check_machine() -> None:
    """Refuse a machine that can't run gVisor at all; raises as the two checks do."""
    check_kind()
    check_namespaces()


def check_kind() -> None:
    """Raises a `ConfigError` where this is not Linux, or of an architecture that gVisor lacks."""
    if sys.platform != "linux":
        msg = f"The local engine needs Linux; this is {sys.platform!r}. Run it in a Linux machine.\n{USE_A_CLOUD}"
        raise ConfigError(msg, op="setup")

    if platform.machine() not in MACHINES:
        msg = f"gVisor runs on {' and '.join(MACHINES)}; this machine is {platform.machine()!r}.\n{USE_A_CLOUD}"
        raise ConfigError(msg, op="setup")


def check_namespaces() -> None:
    """Raises a `ConfigError` where user namespaces are forbidden to an ordinary user."""
    if os.geteuid() == 0:
        return

    try:
        run(["unshare", "--user", "--map-root-user", "--mount", "--net", "true"])
    except EngineError as error:
        msg = (
            f"User namespaces are forbidden to this user ({error.stderr}). Run the engine as root, or allow them: "
            "`sysctl kernel.unprivileged_userns_clone=1`, on Ubuntu also "
            f"`sysctl kernel.apparmor_restrict_unprivileged_userns=0`.\n{USE_A_CLOUD}"
        )
        raise ConfigError(msg, op="setup") from error


def make_directory(path: Path) -> None:
    """Make a directory, its owner's only, and its parents.

    Raises:
        ConfigError: It can't be made or not be written to.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if os.access(path, os.W_OK | os.X_OK):
            return

        reason = "Permission denied"

    msg = f"The directory {str(path)!r} can't be written to ({reason}). Set `SANDBOX_TOOLS_STATE_DIR` to one that can."
    raise ConfigError(msg, op="setup")


def version_of(path: Path) -> int:
    """The release date of a `runsc`, as yyyymmdd.

    Raises:
        ConfigError: It can't be run, or does not tell.
    """
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        msg = f"{str(path)!r} can't be run ({error.strerror}). Set `SANDBOX_TOOLS_RUNSC` to a working `runsc`."
        raise ConfigError(msg, op="setup") from error

    found = VERSION.search(done.stdout)
    if not found:
        msg = f"{str(path)!r} does not name its version. Set `SANDBOX_TOOLS_RUNSC` to a released `runsc`."
        raise ConfigError(msg, op="setup")

    return int(found[1])


def _checked(path: Path) -> Runsc:
    version = version_of(path)
    if version < MINIMUM_VERSION:
        msg = f"{str(path)!r} is version {version}, older than {MINIMUM_VERSION}. Run `sandbox-tools setup`."
        raise ConfigError(msg, op="setup")

    return Runsc(path=path.absolute(), version=version)
