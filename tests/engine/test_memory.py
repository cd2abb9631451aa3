"""Plain images are in memory only, which is the engine's alone, and whoever needs one gets all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox_tools.engine.images import held, keys, sealing, snapshots
from sandbox_tools.engine.images.memory import Memory, place
from sandbox_tools.engine.images.sealing import PIECE
from sandbox_tools.engine.images.store import Store
from sandbox_tools.errors import ConfigError, EngineError
from tests.conftest import as_root
from tests.machine import PATIENCE, plain_images

KEY = secrets.token_bytes(32)


@as_root
def test_roots_engine_has_a_tmpfs_that_nobody_else_finds_and_that_goes_with_its_process(tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    memory = Memory.of(tmp_path)
    with memory.room(1 << 20) as room:
        (room / "pages.img").write_bytes(b"secret")

    assert plain_images(os.getpid(), tmp_path) == [room]
    assert Path("/proc/self/mountinfo").read_text() == before
    # What the engine starts gets there by the name of its descriptor.
    assert subprocess.run(["cat", room / "pages.img"], check=True, capture_output=True).stdout == b"secret"
    memory.stop()
    assert plain_images(os.getpid(), tmp_path) == []
    assert place()[0] == "a tmpfs of the engine's own"


def test_memory_that_is_named_is_taken_if_it_is_memory_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_TOOLS_MEMORY_DIR", "/dev/shm")
    path = Memory.of(tmp_path).path
    assert path.parent == Path("/dev/shm")
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(ConfigError, match="others may read"):
        Memory.of(tmp_path)
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="somebody else's"):
        Memory.of(tmp_path)
    path.unlink()

    monkeypatch.setenv("SANDBOX_TOOLS_MEMORY_DIR", str(Path(__file__).parent))
    with pytest.raises(ConfigError, match="not in memory"):
        Memory.of(tmp_path)


def test_what_a_crash_left_in_memory_is_removed_and_its_directory_stays_this_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_TOOLS_MEMORY_DIR", "/dev/shm")
    crashed = Memory.of(tmp_path)
    with crashed.room(1 << 20) as room:
        (room / "pages.img").write_bytes(b"secret")
    number = crashed.path.stat().st_ino

    after = Memory.of(tmp_path)
    after.start()

    assert list(after.path.iterdir()) == []
    assert after.path.stat().st_ino == number
    after.stop()
    assert not after.path.exists()


def test_an_image_that_memory_has_no_room_for_is_refused_before_it_is_written(tmp_path: Path) -> None:
    store = Store(keys.load(tmp_path), Memory.of(tmp_path))
    with pytest.raises(EngineError, match="larger tmpfs"):
        store.begin(tmp_path / "1", 1 << 50)
    assert list(tmp_path.iterdir()) == [tmp_path / "snapshot.key"]
    assert plain_images(os.getpid(), tmp_path) == []
    store.stop()


def test_what_is_not_sealed_goes_by_way_of_memory_or_straight_to_disk_where_there_is_no_room(tmp_path: Path) -> None:
    store = Store(memory=Memory.of(tmp_path / "state"))
    for name, need in (("1", 1 << 20), ("2", 1 << 50)):
        draft = store.begin(tmp_path / name, need)
        assert (draft.path == draft.partial) == (name == "2")
        (draft.path / "pages.img").write_bytes(b"written" * PIECE)
        draft.whole.set()
        assert store.bring(draft) is None
        assert (draft.partial / "pages.img").read_bytes() == b"written" * PIECE
    assert plain_images(os.getpid(), tmp_path / "state") == []
    store.stop()


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A directory of sealed files, and what is in them."""
    files = {"checkpoint.img": secrets.token_bytes(1000), "pages.img": secrets.token_bytes(20 * PIECE + 9)}
    plain, target = tmp_path / "plain", tmp_path / "sealed"
    plain.mkdir()
    target.mkdir()
    for name, content in files.items():
        (plain / name).write_bytes(content)
    whole = threading.Event()
    whole.set()
    sealing.seal(KEY, "box/1", plain, target, whole=whole, stop=threading.Event())
    return target, files


def test_whoever_opens_a_file_before_it_is_whole_waits_and_gets_the_whole(
    tmp_path: Path, sealed: tuple[Path, dict[str, bytes]]
) -> None:
    source, files = sealed
    sizes = {name: len(content) for name, content in files.items()}
    got: dict[str, bytes] = {}

    for number in range(20):
        target = tmp_path / f"opened-{number}"
        target.mkdir()

        def read(target: Path = target) -> None:
            got.update({name: (target / name).read_bytes() for name in files})

        reading = threading.Thread(target=read)
        # Called before the first piece is there.
        sealing.unseal(KEY, "box/1", sizes, source, target, near=reading.start)
        reading.join()
        assert got == files


def test_whoever_opens_a_file_that_proves_damaged_or_takes_too_long_gets_nothing_of_it(
    tmp_path: Path, sealed: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, files = sealed
    sizes = {name: len(content) for name, content in files.items()}
    got: list[bytes] = []

    def fails(name: str, why: str) -> None:
        target = tmp_path / name
        target.mkdir()
        reading = threading.Thread(target=lambda: got.append((target / "pages.img").read_bytes()))
        with pytest.raises(EngineError, match=why):
            sealing.unseal(KEY, "box/1", sizes, source, target, near=reading.start)
        reading.join()

    with monkeypatch.context() as patch:
        # As if the kernel had taken the leases away by the time that the last piece is written.
        patch.setattr(held, "_break_seconds", lambda: 1e-9)
        fails("late", "too long")
    whole = bytearray((source / "pages.img").read_bytes())
    whole[-1] ^= 1
    (source / "pages.img").write_bytes(whole)
    fails("damaged", "damaged")

    assert got == [b"", b""]


def test_a_disk_that_refuses_to_begin_while_more_is_written_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Event()

    def refuse_once(_fd: int, _at: int) -> None:
        if not refused.is_set():
            refused.set()
            raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(snapshots, "_begin_writing", refuse_once)
    monkeypatch.setattr(snapshots, "_LOOK_EACH", 0.001)
    for store in (Store(), Store(keys.load(tmp_path), Memory.of(tmp_path))):
        refused.clear()
        draft = store.begin(tmp_path / "1", 1 << 20)
        (draft.path / "pages.img").write_bytes(b"written" * PIECE)
        with ThreadPoolExecutor(1) as thread:
            bringing = thread.submit(store.bring, draft)
            asked = refused.wait(PATIENCE)
            draft.whole.set()
        assert asked
        with pytest.raises(OSError, match="failed"):
            bringing.result()
        store.drop(draft)
        store.stop()


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 MB on a disk that can hold no more than 24, and notices when it is written to in earnest."""
    below, disk = tmp_path / "below", tmp_path / "disk"
    below.mkdir()
    disk.mkdir()
    with contextlib.ExitStack() as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", below], check=True)
        mounted.callback(subprocess.run, ["umount", below], check=True)
        with (below / "image").open("wb") as file:
            file.truncate(128 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", below / "image"], check=True)
        looped = subprocess.run(["mount", "-o", "loop", below / "image", disk], capture_output=True, text=True)
        if looped.returncode:
            pytest.skip(f"no file can be mounted as a disk here: {looped.stderr.strip()}")
        mounted.callback(subprocess.run, ["umount", disk], check=True)
        yield disk


@as_root
def test_a_disk_that_fails_while_it_is_kept_at_work_makes_no_snapshot(
    failing_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was asked to begin with and could not keep is noticed at the end, by who needs it there."""
    store = Store()
    draft = store.begin(failing_disk / "1", 0)
    (draft.path / "pages.img").write_bytes(secrets.token_bytes(60 << 20))
    begin, looks, looked = snapshots._begin_writing, iter(range(20)), threading.Event()

    def count(fd: int, at: int) -> None:
        begin(fd, at)
        if next(looks, None) is None:
            looked.set()

    monkeypatch.setattr(snapshots, "_begin_writing", count)
    with ThreadPoolExecutor(1) as thread:
        bringing = thread.submit(store.bring, draft)
        enough = looked.wait(PATIENCE)
        draft.whole.set()
        assert bringing.result(PATIENCE) is None

    assert enough
    with pytest.raises(OSError, match=r"No space|Input/output"):
        snapshots.commit(draft.partial, draft.final, runsc="r", cpu="c")
    assert not draft.final.exists()


def test_a_slow_disk_is_not_waited_for_once_somebody_wants_the_sandbox_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 16 MB that it is asked to begin with may take it a second."""
    begun: list[int] = []
    done = threading.Event()

    def begin(_fd: int, at: int) -> None:
        begun.append(at)
        if len(begun) == 3:
            done.set()

    monkeypatch.setattr(snapshots, "_begin_writing", begin)
    with (tmp_path / "pages.img").open("wb") as file:
        file.truncate(1 << 30)
    snapshots.keep_at_work(tmp_path, done)
    assert begun == [0, 16 << 20, 32 << 20]
