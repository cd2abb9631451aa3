"""Fits root file systems for the guest; what of them has to run, runs inside gVisor and writes there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sandbox_tools.engine.building.wheels import fetch_wheels, guest_requirements
from sandbox_tools.engine.bundle import GUEST_PACKAGES, write_bundle
from sandbox_tools.errors import ConfigError, EngineError

PYTHONS = ("usr/local/bin/python3", "usr/bin/python3")
"""Where a root may have its Python; the first is where Docker's images of Python have theirs."""

LEAST_PYTHON = (3, 11)

_STAGE = GUEST_PACKAGES  # a directory that every root has in the end
_CAPABILITIES = [f"CAP_{name}" for name in ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID")]
_SECONDS = 600.0

# What `sandbox_tools.guest.main` and its kernels load.
_LOADS = (
    "import sandbox_tools.guest.main, sandbox_tools.guest.tunnel, ipykernel.kernelapp, bash_kernel, "
    "matplotlib.pyplot, matplotlib_inline, pandas"
)

INSTALL_PYTHON = (
    f"Install Python {'.'.join(map(str, LEAST_PYTHON))} or newer in the image, as Debian 12 and Ubuntu 24.04 have it: "
    "apt-get install python3"
)


class Fit(BaseModel):
    """What is known of a root's Python, told by itself."""

    python: tuple[int, int]
    libc: tuple[str, str]
    packages: str
    """Where it looks for packages that were installed on top of the system's."""
    have: dict[str, str]
    """The versions of what is installed, by the names' normal form."""

    @property
    def version(self) -> str:
        """Such as `3.11`."""
        return f"{self.python[0]}.{self.python[1]}"

    @property
    def glibc(self) -> int:
        """The minor version of its glibc."""
        return int(self.libc[1].split(".")[1])


def python_of(root: Path) -> str | None:
    """The path inside of the Python that the guest runs on. None: there is none."""
    return next((f"/{each}" for each in PYTHONS if os.path.lexists(root / each)), None)


def look(runsc: Path, root: Path) -> Fit:
    """What a root's Python says of itself.

    Raises:
        ConfigError: It has none that the guest runs on, or is no Debian or Ubuntu; the message says what to install.
    """
    python = python_of(root)
    if python is None:
        msg = f"The image has no `/usr/bin/python3`. {INSTALL_PYTHON}"
        raise ConfigError(msg, op="build")
    if not os.path.lexists(root / "bin/bash") and not os.path.lexists(root / "usr/bin/bash"):
        msg = "The image has no `/bin/bash`, which commands are run by. Install it: apt-get install bash"
        raise ConfigError(msg, op="build")

    try:
        fit = Fit.model_validate_json(run_inside(runsc, root, [python, "-I", "-B", "-c", _script("probe")]))
    except (EngineError, ValidationError) as error:
        said = error.stderr[-600:] if isinstance(error, EngineError) else str(error)
        msg = f"The image's `{python}` can't be run: {said.strip()}. {INSTALL_PYTHON}"
        raise ConfigError(msg, op="build") from error
    if fit.python < LEAST_PYTHON:
        msg = f"The image's `{python}` is version {fit.version}, too old for the sandbox's guest. {INSTALL_PYTHON}"
        raise ConfigError(msg, op="build")
    if fit.libc[0] != "glibc":
        msg = "The image has another C library than glibc, as Alpine has. Base it on Debian or Ubuntu."
        raise ConfigError(msg, op="build")
    return fit


def fit_out(runsc: Path, root: Path, *, guest: Path, tini: Path) -> None:
    """Put into a foreign root what every sandbox needs: the guest's packages, `user`, tini; and see that it loads.

    What the image has of the packages stays as it is.

    Args:
        guest: A directory that holds `sandbox_tools/guest`.
        tini: One that is linked statically.

    Raises:
        ConfigError: It can't be done with this image; the message says what to install in it.
        EngineError: A step failed, such as a download.
    """
    fit = look(runsc, root)
    with tempfile.TemporaryDirectory(prefix=".partial-fit-", dir=root.parent) as scratch:
        stage = Path(scratch)
        wanted = [line for line in guest_requirements() if _normal(line.partition("==")[0]) not in fit.have]
        if wanted:
            fetch_wheels(stage / "wheels", python=fit.version, glibc=fit.glibc, wanted=["--no-deps", *wanted])
        shutil.copy2(tini, stage / "tini")
        add(runsc, root, stage, fit)
    try:
        env = {"PYTHONPATH": GUEST_PACKAGES, "MPLCONFIGDIR": "/nowhere"}
        python = str(python_of(root))
        run_inside(runsc, root, [python, "-B", "-c", _LOADS], mounts={GUEST_PACKAGES: guest}, env=env)
    except EngineError as error:
        why = error.stderr.strip().splitlines()[-1:] or [error.message]
        msg = (
            f"The sandbox's guest does not load in this image: {why[0]}. If that is a package which the image has in "
            "an older version, install a newer one in it, or none; if it is a library, install that."
        )
        raise ConfigError(msg, op="build") from error


def add(runsc: Path, root: Path, stage: Path, fit: Fit) -> None:
    """Add wheels to a root, and whatever else `stage` has for it; nothing that is there is written to.

    Args:
        stage: Has `wheels`, as `fetch_wheels` leaves them; with `tini` beside them the root gets that and `user` too.

    Raises:
        EngineError: It failed.
    """
    for directory in (stage, stage / "wheels"):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
    python = str(python_of(root))
    argv = [python, "-I", "-B", "-c", _script("outfit"), _STAGE, fit.packages]
    run_inside(runsc, root, argv, keep=True, mounts={_STAGE: stage})


def run_inside(
    runsc: Path,
    root: Path,
    argv: Sequence[str],
    *,
    keep: bool = False,
    mounts: Mapping[str, Path] | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command as root of a gVisor container without a network, to its end.

    Args:
        keep: What it writes stays in `root`. Else it is gone afterwards.
        mounts: Directories of the host by where they are inside, read-only.
        env: Variables beside `PATH`.

    Returns:
        Its standard output.

    Raises:
        EngineError: It ended with another exit code than 0, or not in time.
    """
    with tempfile.TemporaryDirectory(prefix="fit-") as scratch:
        bundle = Path(scratch) / "bundle"
        write_bundle(bundle, _config(root, argv, mounts or {}, env or {}))
        name = Path(scratch).name
        flags = [f"--root={scratch}/runsc", "--network=none", "--platform=systrap"]
        flags.append("--overlay2=none" if keep else "--overlay2=root:memory")
        prefix = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount", "--net", "--"]
        command = [*prefix, str(runsc), *flags, "--ignore-cgroups", "run", f"--bundle={bundle}", name]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            msg = f"{argv[0]!r} did not end within {_SECONDS:.0f} s in the new root file system."
            raise EngineError(msg, argv=list(argv), op="build") from None
        finally:
            subprocess.run([*prefix, str(runsc), *flags, "delete", "-force", name], capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        msg = f"{argv[0]!r} ended with exit code {done.returncode} in the new root file system: {said or 'no words'}"
        raise EngineError(msg, argv=list(argv), exit_code=done.returncode, stderr=said, op="build")
    return done.stdout


def _config(root: Path, argv: Sequence[str], mounts: Mapping[str, Path], env: Mapping[str, str]) -> dict[str, object]:
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        "ociVersion": "1.0.2",
        "hostname": "sandbox",
        "root": {"path": str(root), "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "umask": 0o022},
            "args": list(argv),
            "cwd": "/",
            "env": [path, "HOME=/root", "LANG=C.UTF-8", *(f"{name}={value}" for name, value in env.items())],
            "capabilities": {kind: _CAPABILITIES for kind in ("bounding", "effective", "permitted")},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            *(
                {"destination": inside, "type": "bind", "source": str(outside), "options": ["bind", "ro"]}
                for inside, outside in mounts.items()
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }


def _script(name: str) -> str:
    return resources.files("sandbox_tools.engine.building").joinpath(f"inside/{name}.py").read_text(encoding="utf-8")


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
