"""The OCI bundle of a sandbox: what it sees, as what it runs, and what it may use (OCI runtime spec 1.0.2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sandbox_tools.engine.bounds import DISK, process_limits

GUEST_PACKAGES = "/opt/sandbox-tools"
"""Where the guest's own code is mounted inside, read-only."""

PYTHON = "/usr/bin/python3"
"""Where the standard root file system has its Python."""

_CPU_PERIOD = 100_000  # microseconds, as everywhere

_CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]

_GUEST = [
    "/usr/bin/tini",
    "--",
    PYTHON,
    "-m",
    "sandbox_tools.guest.main",
    "--tunnel",
    "--limit-memory",
    "--warm-up",
]


def bundle_config(
    *,
    root: Path,
    guest: Path,
    memory_mb: int,
    cgroup: str | None,
    cpu: float | None = None,
    disk_mb: int | None = None,
    python: str = PYTHON,
) -> dict[str, Any]:
    """The `config.json` of a sandbox.

    Nothing of the host is in it but the template's own root, shared by all and written by none (writes go to the
    sandbox's overlay), and the guest's code, read-only.

    Args:
        root: The template's root file system.
        guest: A directory that holds `sandbox_tools/guest`.
        memory_mb: Shown inside as the machine's memory, and enforced where `cgroup` is given.
        cgroup: The control group to make for it. None where the user may not make one.
        cpu: Cores' worth of CPU time that it gets at most, where `cgroup` is given. None: all there are.
        disk_mb: What it may write to its files, as `Bounds.disk_mb`. None: as the engine says.
        python: What runs the guest, by its path inside.
    """
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
        "resources": {"memory": {"limit": memory_mb << 20}, "pids": {"limit": 4096}},
    }
    if cgroup is not None:
        linux["cgroupsPath"] = cgroup
        if cpu is not None:
            linux["resources"]["cpu"] = {"quota": max(1000, round(cpu * _CPU_PERIOD)), "period": _CPU_PERIOD}

    return {
        "ociVersion": "1.0.2",
        "annotations": {} if disk_mb is None else {DISK: str(disk_mb)},
        "hostname": "sandbox",
        "root": {"path": str(root), "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [python if word == PYTHON else word for word in _GUEST],
            "cwd": "/",
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME=/root",
                "LANG=C.UTF-8",
                f"PYTHONPATH={GUEST_PACKAGES}",
                "PYTHONDONTWRITEBYTECODE=1",
            ],
            "capabilities": {kind: _CAPABILITIES for kind in ("bounding", "effective", "permitted")},
            "rlimits": process_limits(memory_mb),
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "ro"]},
            # In the sandbox's memory: without a size, whoever fills one would end the sandbox.
            *(_tmpfs(path, memory_mb // part) for path, part in (("/dev/shm", 4), ("/tmp", 2))),
            {"destination": GUEST_PACKAGES, "type": "bind", "source": str(guest), "options": ["bind", "ro"]},
        ],
        "linux": linux,
    }


def _tmpfs(path: str, size_mb: int) -> dict[str, Any]:
    options = ["nosuid", "mode=1777", f"size={size_mb}m"]
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options}


def write_bundle(directory: Path, config: dict[str, Any]) -> None:
    """Make `directory` a bundle of that configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
