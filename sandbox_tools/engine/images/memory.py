"""The memory in which images are plain for a moment, apart from every disk.

Root's engine has a tmpfs of its own for them: nobody else has a name for it, it is never swapped out, and it is gone as
soon as the engine is, whatever ends that. Anybody else's has a directory in one of the machine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_tools.errors import ConfigError, EngineError

VARIABLE = "SANDBOX_TOOLS_MEMORY_DIR"

_SHARED = Path("/dev/shm")

# What this machine must have left besides: gVisor itself needs some to write an image.
_SPARE = 64 << 20

# Up to here large pages are at hand, and the quicker ones; for more of them a virtual machine may have to ask its host.
# A resume of 512 MB took 0.67 s with what is opened in such pages and 0.88 s without, one of 1 GB 1.6 s and 1.2 s.
_LITTLE, _LITTLE_TO_OPEN = 256 << 20, 768 << 20

# fsopen(2), fsconfig(2) and fsmount(2), which have these numbers on every architecture but Alpha.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_SET_FLAG, _SET_STRING, _CREATE, _CLOEXEC = 0, 1, 6, 1


class Memory:
    """One engine's room for plain images.

    Args:
        path: A directory in a tmpfs that is this engine's alone.
        large: One with large pages. None: the same.
        mounts: The descriptors of the tmpfs that these are, where they have no other name.
    """

    def __init__(self, path: Path, large: Path | None = None, mounts: tuple[int, ...] = ()) -> None:
        self.path = path
        self._large = large or path
        self._mounts = mounts
        # Bytes that are spoken for, by directory.
        self._promised: dict[Path, int] = {}
        self._checking = threading.Lock()

    @classmethod
    def of(cls, state: Path) -> Memory:
        """The room of the engine on a state directory: in a tmpfs of its own, unless `SANDBOX_TOOLS_MEMORY_DIR` says.

        Raises:
            ConfigError: None can be made, and what `SANDBOX_TOOLS_MEMORY_DIR`, else `/dev/shm`, names is no tmpfs or
                somebody else's.
        """
        mount = _own_mount()
        if mount is None:
            return cls(_directory(state))
        large = _own_mount(large=True)
        if large is None:
            return cls(_path(mount), mounts=(mount,))
        return cls(_path(mount), _path(large), (mount, large))

    def start(self) -> None:
        """Remove what a crash left."""
        # The directory itself stays: its name is anybody's as soon as it is gone.
        for left in self.path.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    def stop(self) -> None:
        """Leave nothing."""
        if not self._mounts:
            shutil.rmtree(self.path, ignore_errors=True)
        for mount in self._mounts:
            os.close(mount)
        self._mounts = ()

    @contextmanager
    def room(self, need: int, *, opening: bool = False) -> Iterator[Path]:
        """A new directory for so many bytes; it stays until `free`, unless what is done with it fails.

        Args:
            opening: Whether for an image that is opened, and not for one that is written.

        Raises:
            EngineError: There is no room for them.
            OSError: It can't be made.
        """
        parent = self._large if need <= (_LITTLE_TO_OPEN if opening else _LITTLE) else self.path
        path = parent / secrets.token_hex(8)
        with self._checking:
            disk = os.statvfs(parent)
            left = min(disk.f_bavail * disk.f_frsize, _available()) - sum(self._promised.values()) - _SPARE
            if need > left:
                where = _words(self.path.parent, own=bool(self._mounts))
                msg = (
                    f"The image needs {need >> 20} MB of memory in {where}, where {max(0, left) >> 20} MB are free. "
                    f"Pause other sandboxes, name a larger tmpfs in `{VARIABLE}`, or start the engine with "
                    "`--no-encryption`."
                )
                raise EngineError(msg)
            self._promised[path] = need
        try:
            path.mkdir(mode=0o700)
            yield path
        except BaseException:
            self.free(path)
            raise

    def free(self, path: Path) -> None:
        """Give back a directory with what is in it."""
        shutil.rmtree(path, ignore_errors=True)
        self._promised.pop(path, None)


def place() -> tuple[str, int]:
    """Where an engine of this user's has its room, in words, and how many bytes it holds.

    Raises:
        ConfigError: As `Memory.of`.
    """
    mount = _own_mount()
    path = _parent() if mount is None else _path(mount)
    try:
        disk = os.statvfs(path)
    finally:
        if mount is not None:
            os.close(mount)
    return _words(path, own=mount is not None), min(disk.f_blocks * disk.f_frsize, _meminfo("MemTotal"))


def _path(mount: int) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{mount}")


def _words(parent: Path, *, own: bool) -> str:
    return "a tmpfs of the engine's own" if own else repr(str(parent))


def _own_mount(*, large: bool = False) -> int | None:
    return None if os.environ.get(VARIABLE) else _own_tmpfs(large=large)


def _own_tmpfs(*, large: bool) -> int | None:
    """The root of a new tmpfs that is mounted nowhere. None: this user may not make one, or this kernel can't."""
    try:
        context = _call(_FSOPEN, b"tmpfs", _CLOEXEC)
    except OSError:
        return None
    try:
        for key, value in ((b"mode", b"0700"), (b"size", b"100%")):
            _call(_FSCONFIG, context, _SET_STRING, key, value, 0)
        with contextlib.suppress(OSError):  # before Linux 6.4
            _call(_FSCONFIG, context, _SET_FLAG, b"noswap", None, 0)
        if large:
            with contextlib.suppress(OSError):  # of a kernel without such pages
                _call(_FSCONFIG, context, _SET_STRING, b"huge", b"within_size", 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, 0)
    except OSError:
        return None
    finally:
        os.close(context)


def _call(number: int, *arguments: bytes | int | None) -> int:
    """A system call that the standard library has no name for."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _directory(state: Path) -> Path:
    """This engine's own directory in a tmpfs of the machine's, made where it is missing."""
    digest = hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:12]
    path = _parent() / f"sandbox-tools-{os.geteuid()}-{digest}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        msg = f"{str(path)!r} can't be made: {error.strerror}. Name another tmpfs in `{VARIABLE}`."
        raise ConfigError(msg, op="serve") from error
    # Whoever may write to its parent may have made it first.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        msg = f"{str(path)!r} is somebody else's, or others may read it. Remove it."
        raise ConfigError(msg, op="serve")
    return path


def _parent() -> Path:
    parent = Path(os.environ.get(VARIABLE) or _SHARED)
    if _file_system(parent) not in ("tmpfs", "ramfs"):
        msg = (
            f"{str(parent)!r} is not in memory, where images are plain for a moment. Name a tmpfs in `{VARIABLE}`, or "
            "start the engine with `--no-encryption`."
        )
        raise ConfigError(msg, op="serve")
    return parent


def _file_system(path: Path) -> str | None:
    """Its type, as `proc(5)` has it in `mountinfo`; None where it can't be told."""
    try:
        real, lines = path.resolve(), Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    mounts = [line.partition(" - ") for line in lines]
    # The last of the longest: a mount hides what was mounted there before.
    holding = [
        (mount.split()[4], kind.split()[0]) for mount, _, kind in mounts if real.is_relative_to(mount.split()[4])
    ]
    return max(enumerate(holding), key=lambda each: (len(each[1][0]), each[0]))[1][1] if holding else None


def _available() -> int:
    """Bytes that can be had without swapping."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
