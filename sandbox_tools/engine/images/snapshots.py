"""Images on disk: a snapshot is whole and synced, or it is not there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sandbox_tools.errors import EngineError

FORMAT = 2
"""Raised when an engine can no longer speak with the guests in older images. 2: larger frames in the tunnel."""

SEALED = 5
"""The format of an image whose files are sealed. Up to 4 each piece knows its file's length; 3 has pieces of 1 MiB."""

MANIFEST = "manifest.json"
DESCRIPTION = "snapshot.json"
"""What a snapshot that users know by name or id says of itself; those that sandboxes sleep in have none."""
_PARTIAL = ".partial-"

_LOOK_EACH = 0.01  # seconds
_BEGUN_AT_ONCE = 16 << 20  # bytes
_SYNC_FILE_RANGE_WRITE = 2

PIECES = 64
PIECE = 64 << 10  # bytes


class Sealed(BaseModel):
    """How the image's files are sealed."""

    model_config = ConfigDict(frozen=True)

    key_id: str
    """Names the key of the keyring under which the snapshot's own is."""
    key: str
    """The snapshot's own key, sealed, base64."""
    context: str
    """What it was sealed as; a copy elsewhere can't pass for another snapshot."""
    sizes: dict[str, int]
    """Bytes of each file when it is plain."""
    piece: int = 1 << 20
    """Bytes of each piece that was sealed by itself, when plain."""
    grown: bool = False
    """Whether the files were sealed as they grew. Their order in `sizes` is that of their numbers then."""


class Manifest(BaseModel):
    """What a snapshot is made of and what it needs; written last, so that its presence means whole."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    runsc: str
    """The pinned `runsc` that wrote the image and is the only one to restore it."""
    cpu: str
    """A digest of the CPU's feature flags: an image runs only where they are all there."""
    files: dict[str, int]
    """Size in bytes of each file of the image."""
    digests: dict[str, str] = {}
    """What `_digest` gives for each that is not sealed. Empty: an earlier engine wrote it."""
    sealed: Sealed | None = None
    """None: it lies there plain."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.files.values())


def begin(final: Path) -> Path:
    """An empty directory beside `final` to write an image into; a crash leaves it for `sweep`."""
    partial = final.with_name(_PARTIAL + final.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, final: Path, *, runsc: str, cpu: str, sealed: Sealed | None = None) -> Manifest:
    """Make a written image a snapshot, durably: files synced, then named.

    Args:
        sealed: How its files were sealed. None: they were not.

    Raises:
        OSError: The disk is full or failing; `final` does not exist then.
    """
    paths = sorted(partial.iterdir())
    with ThreadPoolExecutor(1) as thread:
        synced = [thread.submit(sync, path) for path in paths]
        manifest = Manifest(
            format=FORMAT if sealed is None else SEALED,
            runsc=runsc,
            cpu=cpu,
            files={path.name: path.stat().st_size for path in paths},
            # What is sealed is looked through as a whole when it is opened.
            digests={path.name: _digest(path) for path in paths if sealed is None or path.name not in sealed.sizes},
            sealed=sealed,
        )
        for each in synced:
            each.result()
    (partial / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    sync(partial / MANIFEST)
    sync(partial)
    partial.rename(final)
    sync(final.parent)
    return manifest


def verify(path: Path, *, cpu: str) -> Manifest:
    """The manifest of a snapshot whose files are all there as they were written, and which this machine can run.

    Raises:
        EngineError: It is missing, torn, damaged, of another format or for another CPU; the message says which.
    """
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        sizes = {name: (path / name).stat().st_size for name in manifest.files}
        digests = {name: _digest(path / name) for name in manifest.digests}
    except (OSError, ValidationError) as error:
        msg = f"The snapshot {path.name!r} is missing or torn ({type(error).__name__}). It cannot be resumed."
        raise EngineError(msg, op="restore") from error

    readable = (FORMAT,) if manifest.sealed is None else (3, 4, SEALED)
    if manifest.format not in readable:
        known = readable[-1]
        msg = f"The snapshot {path.name!r} has format {manifest.format}, not {known}. Use the engine that wrote it."
        raise EngineError(msg, op="restore")
    if sizes != manifest.files:
        msg = f"The snapshot {path.name!r} is torn: file sizes differ from its manifest. It cannot be resumed."
        raise EngineError(msg, op="restore")
    if digests != manifest.digests:
        msg = f"The snapshot {path.name!r} is damaged: its bytes are not those that were written. It cannot be resumed."
        raise EngineError(msg, op="restore")
    if manifest.cpu != cpu:
        msg = f"The snapshot {path.name!r} needs a CPU with other features. Resume it on the machine that wrote it."
        raise EngineError(msg, op="restore")
    return manifest


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a long one, of pieces spread evenly over it.

    To read a gigabyte as a whole would make its resume half as long again (1.8 GB/s); the pieces take milliseconds, and
    find what a disk or a file system loses, which is whole blocks and ends. They are no guard against forgery.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= PIECES * PIECE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for number in range(PIECES):
            digest.update(os.pread(file.fileno(), PIECE, (size - PIECE) * number // (PIECES - 1)))
        return digest.hexdigest()


def sweep(directory: Path) -> None:
    """Remove what crashes left half-written in `directory`."""
    for path in directory.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def keep_at_work(directory: Path, done: threading.Event) -> None:
    """Have the disk at work on files that are being written: a third less until all is on it. Who needs it there syncs.

    It is only asked to begin (sync_file_range(2)). To wait for it would hold up whoever writes, and what the kernel has
    told of a disk that fails it does not tell again to the sync at the end.

    Raises:
        OSError: It refuses.
    """
    while not done.wait(_LOOK_EACH):
        for path in filter(Path.is_file, directory.iterdir()):
            fd = os.open(path, os.O_RDONLY)
            try:
                # A little at a time: even to begin takes a slow disk long, and `done` may mean that somebody waits.
                for at in range(0, os.fstat(fd).st_size, _BEGUN_AT_ONCE):
                    if done.is_set():
                        return
                    _begin_writing(fd, at)
            finally:
                os.close(fd)


def _begin_writing(fd: int, at: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(_BEGUN_AT_ONCE), _SYNC_FILE_RANGE_WRITE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sync(path: Path) -> None:
    """Have a file, or a directory's list of names, on the disk and not only in its cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replace a small file so that a crash leaves the old text or the new, never a mixture.

    Args:
        mode: Who may read and write it, where the umask has no objection.
    """
    partial = path.with_name(_PARTIAL + path.name)
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)
