"""Where sandboxes' images are written and read: on disk they are sealed, plain they are only ever in memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_tools.engine import sealing, snapshots
from sandbox_tools.engine.keys import KEY_BYTES, Keyring
from sandbox_tools.engine.snapshots import MANIFEST, Manifest, Sealed, write_durably
from sandbox_tools.errors import ConfigError, EngineError

VARIABLE = "SANDBOX_TOOLS_MEMORY_DIR"

_MEMORY = Path("/dev/shm")

# What this machine must have left besides: gVisor itself needs some to write an image.
_SPARE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An image that is being written, and is no snapshot yet.

    Attributes:
        final: Where the snapshot will be.
        partial: Where it becomes what it will be; beside `final`, so that a rename ends it.
        path: Where the runtime writes it: in memory, or `partial` where nothing is sealed.
        given_up: Set when nobody wants it any more.
    """

    final: Path
    partial: Path
    path: Path
    given_up: threading.Event = field(default_factory=threading.Event)


class Store:
    """The images of one engine.

    Args:
        keys: What they are sealed with. None: they are not, and lie on the disk as they are.
        memory: A directory of this engine's own in memory; see `memory_directory`. None where `keys` is.
    """

    def __init__(self, keys: Keyring | None = None, memory: Path | None = None) -> None:
        self.keys = keys
        self._memory = memory
        # Bytes of memory that are spoken for, by directory.
        self._promised: dict[Path, int] = {}
        self._checking = threading.Lock()

    def start(self) -> None:
        """Remove what a crash left in memory."""
        # The directory itself stays: its name is anybody's as soon as it is gone.
        for left in self._memory.iterdir() if self._memory is not None else ():
            shutil.rmtree(left, ignore_errors=True)

    def stop(self) -> None:
        """Leave nothing in memory."""
        if self._memory is not None:
            shutil.rmtree(self._memory, ignore_errors=True)

    def begin(self, final: Path, need: int) -> Draft:
        """Empty directories to write an image into.

        Args:
            need: Bytes that it may have.

        Raises:
            EngineError: It would not fit into memory.
            OSError: The disk is full or failing.
        """
        partial = snapshots.begin(final)
        if self._memory is None:
            return Draft(final=final, partial=partial, path=partial)

        try:
            with self._room(need) as plain:
                return Draft(final=final, partial=partial, path=plain)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def seal(self, draft: Draft) -> Sealed | None:
        """Bring what the runtime has written to its place on the disk, and free the memory. None: it is there already.

        Raises:
            OSError: The disk is full or failing.
            sealing.GivenUpError: Nobody wants it any more.
        """
        if self.keys is None:
            return None

        context, key = _context(draft.final), secrets.token_bytes(KEY_BYTES)
        sizes = sealing.seal(key, context, draft.path, draft.partial, draft.given_up)
        self._free(draft.path)
        return Sealed(key_id=self.keys.newest, key=self.keys.wrap(key, context), context=context, sizes=sizes)

    def drop(self, draft: Draft) -> None:
        """Leave nothing of a draft; a snapshot that it has become stays."""
        self._free(draft.path)
        shutil.rmtree(draft.partial, ignore_errors=True)

    @asynccontextmanager
    async def opened(self, path: Path, *, cpu: str) -> AsyncIterator[Path]:
        """A directory with the plain image, to restore from; it is gone afterwards where it is not the image itself.

        Raises:
            EngineError: It is missing, torn, damaged, not for this machine or sealed with a key that is not here; or
                there is no memory for it.
        """
        manifest = await asyncio.to_thread(snapshots.verify, path, cpu=cpu)
        if manifest.sealed is None:
            yield path
            return

        plain = await asyncio.to_thread(self._unseal, path, manifest.sealed)
        try:
            yield plain
        finally:
            # A gigabyte takes 0.1 s, which nobody has to wait for.
            asyncio.get_running_loop().run_in_executor(None, self._free, plain)

    def rewrap(self, path: Path) -> bool:
        """Put a snapshot's key under the keyring's newest one; whether that was to be done.

        Raises:
            EngineError: The key that it is under is not here.
            OSError: The disk is full or failing; the snapshot is as it was.
        """
        try:
            manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return False  # what is no snapshot, or torn, is told to who resumes it
        sealed = manifest.sealed
        if self.keys is None or sealed is None or sealed.key_id == self.keys.newest:
            return False

        key = self.keys.unwrap(sealed.key_id, sealed.key, sealed.context)
        changes = {"key_id": self.keys.newest, "key": self.keys.wrap(key, sealed.context)}
        moved = manifest.model_copy(update={"sealed": sealed.model_copy(update=changes)})
        write_durably(path / MANIFEST, moved.model_dump_json())
        return True

    def _unseal(self, path: Path, sealed: Sealed) -> Path:
        if self.keys is None:
            msg = f"The snapshot {path.name!r} is sealed, and this engine was told to go without keys. Let it use them."
            raise EngineError(msg, op="restore")
        if sealed.context != _context(path):
            msg = f"The snapshot {path.name!r} is that of {sealed.context!r}, moved here. It cannot be resumed."
            raise EngineError(msg, op="restore")

        key = self.keys.unwrap(sealed.key_id, sealed.key, sealed.context)
        try:
            with self._room(sum(sealed.sizes.values())) as plain:
                sealing.unseal(key, sealed.context, sealed.sizes, path, plain)
                return plain
        except OSError as error:
            msg = f"The snapshot {path.name!r} can't be opened: {error}. Free some memory, and some disk space."
            raise EngineError(msg, op="restore") from error

    @contextmanager
    def _room(self, need: int) -> Iterator[Path]:
        """A new directory in memory; it stays, unless what is done with it fails."""
        assert self._memory is not None
        path = self._memory / secrets.token_hex(8)
        with self._checking:
            disk = os.statvfs(self._memory)
            free = min(disk.f_bavail * disk.f_frsize, _memory_left()) - sum(self._promised.values()) - _SPARE
            if need > free:
                msg = (
                    f"The image needs {need >> 20} MB of memory in {str(self._memory.parent)!r}, where "
                    f"{max(0, free) >> 20} MB are free. Pause other sandboxes, name a larger tmpfs in `{VARIABLE}`, or "
                    "start the engine with `--no-encryption`."
                )
                raise EngineError(msg)
            self._promised[path] = need
        try:
            path.mkdir(mode=0o700)
            yield path
        except BaseException:
            self._free(path)
            raise

    def _free(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        self._promised.pop(path, None)


def memory_parent() -> Path:
    """Where engines have their directories in memory: `SANDBOX_TOOLS_MEMORY_DIR`, else `/dev/shm`.

    Raises:
        ConfigError: That is no tmpfs.
    """
    parent = Path(os.environ.get(VARIABLE) or _MEMORY)
    if _file_system(parent) not in ("tmpfs", "ramfs"):
        msg = (
            f"{str(parent)!r} is not in memory, where images are plain for a moment. Name a tmpfs in `{VARIABLE}`, or "
            "start the engine with `--no-encryption`."
        )
        raise ConfigError(msg, op="serve")
    return parent


def memory_directory(state: Path) -> Path:
    """This engine's own directory in memory, made where it is missing.

    Raises:
        ConfigError: As `memory_parent`, or what lies there is somebody else's.
    """
    digest = hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:12]
    path = memory_parent() / f"sandbox-tools-{os.geteuid()}-{digest}"
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


def _context(path: Path) -> str:
    # Names are never used twice, and a pause that is kept moves to where other snapshots are.
    return path.name


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


def _memory_left() -> int:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
