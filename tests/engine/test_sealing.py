"""What is sealed is what was written, in the place where it was written, or it is refused."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_tools.engine.images import keys, sealing
from sandbox_tools.engine.images.keys import Keyring
from sandbox_tools.engine.images.memory import Memory
from sandbox_tools.engine.images.rotation import rotate
from sandbox_tools.engine.images.sealing import PIECE, TAG
from sandbox_tools.engine.images.snapshots import MANIFEST, Manifest, commit
from sandbox_tools.engine.images.store import Store
from sandbox_tools.errors import ConfigError, EngineError
from tests.machine import PATIENCE

KEY = secrets.token_bytes(32)
SIZES = (0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 7)


def directory(path: Path, files: dict[str, bytes] | None = None) -> Path:
    path.mkdir()
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    return path


def sealed(tmp_path: Path, files: dict[str, bytes], context: str = "box/1") -> tuple[Path, dict[str, int]]:
    plain, target = directory(tmp_path / "plain", files), directory(tmp_path / "sealed")
    return target, sealing.seal(KEY, context, plain, target, whole=done(), stop=threading.Event())


def done() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def opened(tmp_path: Path, source: Path, sizes: dict[str, int], context: str = "box/1") -> dict[str, bytes]:
    target = directory(tmp_path / secrets.token_hex(4))
    sealing.unseal(KEY, context, sizes, source, target)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def test_files_of_every_size_come_back_as_they_were_and_nothing_of_them_is_in_what_is_sealed(tmp_path: Path) -> None:
    files = {f"{size}": secrets.token_bytes(size) for size in SIZES}
    source, sizes = sealed(tmp_path, files)

    assert opened(tmp_path, source, sizes) == files
    for name, content in files.items():
        on_disk = (source / name).read_bytes()
        assert len(on_disk) == len(content) + max(1, -(-len(content) // PIECE)) * TAG
        assert len(content) < 16 or content[:16] not in on_disk


def test_files_that_have_to_come_from_the_disk_are_there_as_whole(tmp_path: Path) -> None:
    files = {"checkpoint.img": secrets.token_bytes(1000), "pages.img": secrets.token_bytes(64 * PIECE + 9)}
    source, sizes = sealed(tmp_path, files)
    for path in source.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            pytest.skip("temporary files are in memory here, so that none has to come from the disk")

    assert opened(tmp_path, source, sizes) == files


@given(at=st.integers(0, 2 * PIECE + 8), bit=st.integers(0, 7))
def test_one_changed_bit_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    tmp_path = tmp_path_factory.mktemp("bit")
    source, sizes = sealed(tmp_path, {"pages.img": bytes(2 * PIECE + 9)})
    whole = bytearray((source / "pages.img").read_bytes())
    whole[at] ^= 1 << bit
    (source / "pages.img").write_bytes(whole)

    with pytest.raises(EngineError, match="damaged"):
        opened(tmp_path, source, sizes)


def test_pieces_that_are_missing_swapped_repeated_or_of_another_file_or_snapshot_are_refused(tmp_path: Path) -> None:
    files = {"a": secrets.token_bytes(2 * PIECE), "b": secrets.token_bytes(2 * PIECE)}
    source, sizes = sealed(tmp_path, files)
    a, b = (source / "a").read_bytes(), (source / "b").read_bytes()
    first, second = a[: PIECE + TAG], a[PIECE + TAG :]
    for forged in (first, second + first, first + first, b, first + second[:-1]):
        (source / "a").write_bytes(forged)
        with pytest.raises(EngineError, match="damaged"):
            opened(tmp_path, source, sizes)
    (source / "a").write_bytes(a)

    with pytest.raises(EngineError, match="damaged"):
        opened(tmp_path, source, sizes, context="another/1")
    # A manifest that was changed as well does not make a cut file whole.
    (source / "a").write_bytes(first)
    with pytest.raises(EngineError, match="damaged"):
        opened(tmp_path, source, sizes | {"a": PIECE})


@pytest.mark.parametrize(("form", "piece"), [(3, 1 << 20), (4, PIECE)])
async def test_a_snapshot_of_an_engine_that_sealed_what_was_whole_already_is_opened(
    tmp_path: Path, form: int, piece: int
) -> None:
    """Every piece knows its file's length, files have their numbers by name; format 3 does not tell a piece's size."""
    contents = {"b": b"", "pages.img": secrets.token_bytes(piece + 9), "a": secrets.token_bytes(7)}
    ring, image = keys.load(tmp_path), directory(tmp_path / "old")
    for number, name in enumerate(sorted(contents)):
        content, about = contents[name], f"old\0{name}\0{len(contents[name])}".encode()
        pieces = [content[at : at + piece] for at in range(0, len(content), piece)]
        sealed = [AESGCM(KEY).encrypt(struct.pack(">IQ", number, at), each, about) for at, each in enumerate(pieces)]
        (image / name).write_bytes(b"".join(sealed))
    sizes = {name: len(content) for name, content in contents.items()}
    told = {"key_id": ring.newest, "key": ring.wrap(KEY, "old"), "context": "old", "sizes": sizes}
    told |= {"piece": piece} if form > 3 else {}
    files = {name: (image / name).stat().st_size for name in contents}
    manifest = {"format": form, "runsc": "r", "cpu": "c", "files": files, "sealed": told}
    (image / MANIFEST).write_text(json.dumps(manifest))

    store = Store(ring, Memory.of(tmp_path))
    async with store.opened(image, cpu="c") as plain:
        assert {name: (plain / name).read_bytes() for name in contents} == contents
    store.stop()


def test_sealing_that_is_given_up_stops_in_the_middle(tmp_path: Path) -> None:
    plain, target = directory(tmp_path / "plain", {"a": bytes(8 * PIECE)}), directory(tmp_path / "out")
    with pytest.raises(sealing.GivenUpError):
        sealing.seal(KEY, "box/1", plain, target, whole=done(), stop=done())
    with pytest.raises(sealing.GivenUpError):
        sealing.seal(KEY, "box/1", plain, directory(tmp_path / "more"), whole=threading.Event(), stop=done())


class Growth:
    """A directory whose files grow while it is sealed."""

    def __init__(self, tmp_path: Path, *, plain: bool = False) -> None:
        self.plain, self.target = directory(tmp_path / "growing"), directory(tmp_path / "followed")
        self.files: dict[str, bytes] = {}
        self.whole = threading.Event()
        self.threads = ThreadPoolExecutor(1)
        work = sealing.copy if plain else partial(sealing.seal, KEY, "box/1")
        self.sealing = self.threads.submit(work, self.plain, self.target, whole=self.whole, stop=threading.Event())

    def grow(self, name: str, size: int) -> None:
        content = secrets.token_bytes(size)
        self.files[name] = self.files.get(name, b"") + content
        with (self.plain / name).open("ab") as file:
            file.write(content)

    def followed(self) -> None:
        """Until everything is sealed that may be."""
        deadline = time.monotonic() + PATIENCE
        for name, content in self.files.items():
            pieces = max(0, -(-len(content) // PIECE) - 1)
            while not self.sealing.done():
                with contextlib.suppress(FileNotFoundError):
                    if (self.target / name).stat().st_size >= pieces * PIECE:
                        break
                assert time.monotonic() < deadline
                time.sleep(0.001)

    def end(self) -> Any:
        self.whole.set()
        try:
            return self.sealing.result(PATIENCE)
        finally:
            self.threads.shutdown()


GROWN = st.sampled_from((0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("abc"), GROWN, st.booleans()), max_size=8))
def test_what_grows_while_it_is_sealed_is_sealed_whole_however_it_grows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bool]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("growth")
    growth = Growth(tmp_path)
    for name, size, wait in steps:
        growth.grow(name, size)
        if wait:
            growth.followed()
    sizes = growth.end()

    assert sizes == {name: len(content) for name, content in growth.files.items()}
    assert opened(tmp_path, growth.target, sizes) == growth.files
    # As an earlier moment would have been, had it been the end: cut after a whole piece, and its manifest too.
    for name, content in growth.files.items():
        whole = (growth.target / name).read_bytes()
        for pieces in range((len(content) - 1) // PIECE):
            (growth.target / name).write_bytes(whole[: (pieces + 1) * (PIECE + TAG)])
            with pytest.raises(EngineError, match="damaged"):
                opened(tmp_path, growth.target, sizes | {name: (pieces + 1) * PIECE})
        (growth.target / name).write_bytes(whole)
        if content:
            (growth.target / name).write_bytes(b"")
            with pytest.raises(EngineError, match="damaged"):
                opened(tmp_path, growth.target, sizes | {name: 0})
            (growth.target / name).write_bytes(whole)


def test_what_is_not_sealed_is_followed_just_so(tmp_path: Path) -> None:
    growth = Growth(tmp_path, plain=True)
    for _ in range(3):
        growth.grow("pages.img", 3 * PIECE + 1)
        growth.followed()
    growth.end()
    assert {path.name: path.read_bytes() for path in growth.target.iterdir()} == growth.files


def test_a_file_that_is_cut_while_it_is_sealed_is_refused(tmp_path: Path) -> None:
    """A piece that changes would be sealed twice under one nonce."""
    growth = Growth(tmp_path)
    growth.grow("pages.img", 3 * PIECE)
    growth.followed()
    os.truncate(growth.plain / "pages.img", PIECE)
    with pytest.raises(EngineError, match="was cut"):
        growth.end()


def test_a_key_is_made_once_in_a_file_that_is_its_owners_only(tmp_path: Path) -> None:
    ring = keys.load(tmp_path)
    file = tmp_path / "snapshot.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert keys.load(tmp_path).newest == ring.newest

    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.load(tmp_path)


def test_keys_come_from_a_variable_or_a_command_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = (base64.b64encode(secrets.token_bytes(32)).decode() for _ in range(2))
    before = Keyring([base64.b64decode(old)], "here")
    monkeypatch.setenv(keys.COMMAND, f"echo {new} {old}")
    printed = keys.load(tmp_path)
    monkeypatch.setenv(keys.VARIABLE, f"{new}\n{old}")
    named = keys.load(tmp_path)

    assert printed.newest == named.newest != before.newest
    assert named.unwrap(before.newest, before.wrap(KEY, "box/1"), "box/1") == KEY
    assert not (tmp_path / "snapshot.key").exists()


@pytest.mark.parametrize("text", ["", "c2hvcnQ=", "not base64 at all!", "QUJD" * 11])
def test_what_is_no_key_is_refused_without_being_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = tmp_path / "snapshot.key"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="openssl rand") as refused:
        keys.load(tmp_path)
    assert not text or text not in str(refused.value)

    monkeypatch.setenv(keys.COMMAND, "false")
    with pytest.raises(ConfigError, match="gave no key"):
        keys.load(tmp_path)


def test_a_snapshots_key_opens_for_that_snapshot_only_and_with_the_key_that_sealed_it_only() -> None:
    ring, other = Keyring([KEY], "here"), Keyring([secrets.token_bytes(32)], "there")
    wrapped = ring.wrap(b"k" * 32, "box/1")
    with pytest.raises(EngineError, match="another snapshot's"):
        ring.unwrap(ring.newest, wrapped, "box/2")
    with pytest.raises(EngineError, match="not among those in there"):
        other.unwrap(ring.newest, wrapped, "box/1")


def snapshot(state: Path, store: Store, where: str) -> Path:
    """A sealed one, as the engine would leave it."""
    final = state / where
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = store.begin(final, 1 << 20)
    (draft.path / "pages.img").write_bytes(b"secret" * 1000)
    draft.whole.set()
    commit(draft.partial, final, runsc="r", cpu="c", sealed=store.bring(draft))
    return final


async def test_a_rotation_puts_every_snapshot_under_the_new_key_and_forgets_the_old_one(tmp_path: Path) -> None:
    store = Store(keys.load(tmp_path), Memory.of(tmp_path))
    made = [snapshot(tmp_path, store, where) for where in ("snapshots/box/1", "snapshots/box/2", "saved/3")]
    old = (tmp_path / "snapshot.key").read_text()

    outcome = rotate(tmp_path, None)

    assert (outcome.moved, outcome.lost) == (3, ())
    assert old not in (tmp_path / "snapshot.key").read_text()
    after = Store(keys.load(tmp_path), Memory.of(tmp_path))
    for each in made:
        assert Manifest.model_validate_json((each / MANIFEST).read_bytes()).sealed.key_id == outcome.key_id  # type: ignore[union-attr]
        async with after.opened(each, cpu="c") as plain:
            assert (plain / "pages.img").read_bytes() == b"secret" * 1000
    with pytest.raises(EngineError, match="not among those"):
        async with store.opened(made[0], cpu="c"):
            pass
    after.stop()


@pytest.mark.parametrize("dies_at", range(6))
async def test_a_rotation_that_dies_anywhere_leaves_every_snapshot_open_and_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    store = Store(keys.load(tmp_path), Memory.of(tmp_path))
    made = [snapshot(tmp_path, store, f"snapshots/box/{number}") for number in range(3)]
    writes = 0

    def dying(*arguments: object, **more: object) -> None:
        nonlocal writes
        writes += 1
        if writes > dies_at:
            raise KeyboardInterrupt
        original(*arguments, **more)  # type: ignore[arg-type]

    original = keys.write_durably
    with monkeypatch.context() as patch:
        patch.setattr("sandbox_tools.engine.images.keys.write_durably", dying)
        patch.setattr("sandbox_tools.engine.images.store.write_durably", dying)
        if dies_at < 5:
            with pytest.raises(KeyboardInterrupt):
                rotate(tmp_path, None)
        else:
            rotate(tmp_path, None)

    for _ in range(2):
        now = Store(keys.load(tmp_path), Memory.of(tmp_path))
        for each in made:
            async with now.opened(each, cpu="c") as plain:
                assert (plain / "pages.img").read_bytes() == b"secret" * 1000
        rotate(tmp_path, None)
    now.stop()
