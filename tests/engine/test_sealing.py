"""What is sealed is what was written, in the place where it was written, or it is refused."""

from __future__ import annotations

import base64
import json
import secrets
import struct
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.engine.images import keys, sealing
from sandbox_tools.engine.images.keys import Keyring
from sandbox_tools.engine.images.memory import Memory
from sandbox_tools.engine.images.rotation import rotate
from sandbox_tools.engine.images.sealing import PIECE, TAG
from sandbox_tools.engine.images.snapshots import MANIFEST, Manifest, commit
from sandbox_tools.engine.images.store import Store
from sandbox_tools.errors import ConfigError, EngineError

KEY = secrets.token_bytes(32)
SIZES = (0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 7)


def directory(path: Path, files: dict[str, bytes] | None = None) -> Path:
    path.mkdir()
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    return path


def sealed(tmp_path: Path, files: dict[str, bytes], context: str = "box/1") -> tuple[Path, dict[str, int]]:
    plain, target = directory(tmp_path / "plain", files), directory(tmp_path / "sealed")
    return target, sealing.seal(KEY, context, plain, target, threading.Event())


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
        assert len(on_disk) == len(content) + -(-len(content) // PIECE) * TAG
        assert len(content) < 16 or content[:16] not in on_disk


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


async def test_a_snapshot_of_an_engine_that_sealed_in_pieces_of_1_mib_is_opened(tmp_path: Path) -> None:
    """Format 3, whose manifest does not tell the size of a piece."""
    content, ring = secrets.token_bytes((1 << 20) + 9), keys.load(tmp_path)
    image = directory(tmp_path / "old")
    about = f"old\0pages.img\0{len(content)}".encode()
    pieces = (content[: 1 << 20], content[1 << 20 :])
    sealed_pieces = [AESGCM(KEY).encrypt(struct.pack(">IQ", 0, at), each, about) for at, each in enumerate(pieces)]
    (image / "pages.img").write_bytes(b"".join(sealed_pieces))
    told = {"key_id": ring.newest, "key": ring.wrap(KEY, "old"), "context": "old", "sizes": {"pages.img": len(content)}}
    files = {"pages.img": (image / "pages.img").stat().st_size}
    (image / MANIFEST).write_text(json.dumps({"format": 3, "runsc": "r", "cpu": "c", "files": files, "sealed": told}))

    store = Store(ring, Memory.of(tmp_path))
    async with store.opened(image, cpu="c") as plain:
        assert (plain / "pages.img").read_bytes() == content
    store.stop()


def test_sealing_that_is_given_up_stops_in_the_middle(tmp_path: Path) -> None:
    plain, target, stop = (
        directory(tmp_path / "plain", {"a": bytes(8 * PIECE)}),
        directory(tmp_path / "out"),
        threading.Event(),
    )
    stop.set()
    with pytest.raises(sealing.GivenUpError):
        sealing.seal(KEY, "box/1", plain, target, stop)


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
    commit(draft.partial, final, runsc="r", cpu="c", sealed=store.seal(draft))
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
