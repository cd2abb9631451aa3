"""Where sandboxes' images are written and read: on disk they are sealed, plain they are only ever in memory."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sandbox_tools.engine.images import sealing, snapshots
from sandbox_tools.engine.images.keys import KEY_BYTES, Keyring
from sandbox_tools.engine.images.memory import Memory
from sandbox_tools.engine.images.snapshots import MANIFEST, Manifest, Sealed, write_durably
from sandbox_tools.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An image that is being written, and is no snapshot yet.

    Attributes:
        final: Where the snapshot will be.
        partial: Where it becomes what it will be; beside `final`, so that a rename ends it.
        path: Where the runtime writes it: in memory, or `partial`.
        whole: Set when the runtime has written all of it.
        given_up: Set when nobody wants it any more.
    """

    final: Path
    partial: Path
    path: Path
    whole: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)


class Store:
    """The images of one engine.

    Args:
        keys: What they are sealed with. None: they are not, and lie on the disk as they are.
        memory: Where they are plain while they are written and read. None: only where `keys` is.
    """

    def __init__(self, keys: Keyring | None = None, memory: Memory | None = None) -> None:
        self.keys = keys
        self._memory = memory

    def start(self) -> None:
        """Remove what a crash left in memory."""
        if self._memory is not None:
            self._memory.start()

    def stop(self) -> None:
        """Leave nothing in memory."""
        if self._memory is not None:
            self._memory.stop()

    def begin(self, final: Path, need: int) -> Draft:
        """Empty directories to write an image into.

        Args:
            need: Bytes that it may have.

        Raises:
            EngineError: It would not fit into memory, where it has to.
            OSError: The disk is full or failing.
        """
        beside = snapshots.begin(final)
        try:
            return Draft(final=final, partial=beside, path=self._plain(need) or beside)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    def _plain(self, need: int) -> Path | None:
        """A directory in memory. None: the runtime has to write to the disk itself: a gigabyte takes a third longer."""
        if self._memory is None:
            return None
        try:
            with self._memory.room(need) as plain:
                return plain
        except EngineError:
            if self.keys is None:
                return None
            raise

    def bring(self, draft: Draft) -> Sealed | None:
        """Bring what the runtime writes to its place on the disk, and free the memory. None: it lies there plain.

        It ends when the draft is `whole`; begun before that, it keeps pace.

        Raises:
            EngineError: The runtime has cut a file that it had begun.
            OSError: The disk is full or failing.
            sealing.GivenUpError: Nobody wants it any more.
        """
        if draft.path == draft.partial:
            snapshots.keep_at_work(draft.partial, draft.whole)
            return None

        moments = {"whole": draft.whole, "stop": draft.given_up}
        if self.keys is None:
            sealing.copy(draft.path, draft.partial, **moments)
            self._free(draft.path)
            return None

        context, key = _context(draft.final), secrets.token_bytes(KEY_BYTES)
        sizes = sealing.seal(key, context, draft.path, draft.partial, **moments)
        self._free(draft.path)
        return Sealed(
            key_id=self.keys.newest,
            key=self.keys.wrap(key, context),
            context=context,
            sizes=sizes,
            piece=sealing.PIECE,
            grown=True,
        )

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

        near, loop = asyncio.Event(), asyncio.get_running_loop()
        open_, plain = await asyncio.to_thread(self._opening, path, manifest.sealed)
        opening = asyncio.ensure_future(asyncio.to_thread(open_, near=partial(loop.call_soon_threadsafe, near.set)))
        opening.add_done_callback(lambda _: near.set())
        try:
            await near.wait()
            if opening.done():
                opening.result()
            try:
                yield plain
            except EngineError:
                await opening  # what the runtime misses in it says why
                raise
            await opening
        finally:
            # A gigabyte takes 0.1 s, which nobody has to wait for.
            opening.add_done_callback(lambda _: loop.run_in_executor(None, self._free, plain))

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

    def _opening(self, path: Path, sealed: Sealed) -> tuple[Callable[..., None], Path]:
        """What opens a snapshot, and the directory that it opens it into."""
        if self.keys is None:
            msg = f"The snapshot {path.name!r} is sealed, and this engine was told to go without keys. Let it use them."
            raise EngineError(msg, op="restore")
        if sealed.context != _context(path):
            msg = f"The snapshot {path.name!r} is that of {sealed.context!r}, moved here. It cannot be resumed."
            raise EngineError(msg, op="restore")

        assert self._memory is not None
        key = self.keys.unwrap(sealed.key_id, sealed.key, sealed.context)
        try:
            with self._memory.room(sum(sealed.sizes.values()), opening=True) as plain:
                return partial(_unseal, key, path, plain, sealed), plain
        except OSError as error:
            raise _unopened(path, error) from error

    def _free(self, path: Path) -> None:
        if self._memory is not None:
            self._memory.free(path)


def _unseal(key: bytes, path: Path, plain: Path, sealed: Sealed, *, near: Callable[[], None]) -> None:
    try:
        sealing.unseal(
            key, sealed.context, sealed.sizes, path, plain, piece=sealed.piece, grown=sealed.grown, near=near
        )
    except OSError as error:
        raise _unopened(path, error) from error


def _unopened(path: Path, error: OSError) -> EngineError:
    msg = f"The snapshot {path.name!r} can't be opened: {error}. Free some memory, and some disk space."
    return EngineError(msg, op="restore")


def _context(path: Path) -> str:
    # Names are never used twice, and a pause that is kept moves to where other snapshots are.
    return path.name
