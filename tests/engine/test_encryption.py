"""What sandboxes held lies sealed on the disk, opens in its place and with its key, and nowhere else."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import as_root, own_state
from tests.machine import EngineProcess

MARK = "mark-" + secrets.token_hex(16)

# In memory and in a file, more than once, so that it lies in the image whatever is left out of it.
HOLD = f"mark = {MARK!r}; marks = [mark * 1000 for _ in range(1000)]; open('/home/user/mark', 'w').write(mark * 10000)"


def files_with_the_mark(*directories: Path) -> list[str]:
    """Those on the disk in which it can be read."""
    found = []
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    tail = b""
                    while piece := file.read(1 << 22):
                        if MARK.encode() in tail + piece:
                            found.append(str(path))
                            break
                        tail = piece[-len(MARK) :]
    return found


def test_what_a_paused_sandbox_a_snapshot_and_a_fork_held_can_be_read_nowhere_on_the_disk(
    own_engine: EngineProcess,
) -> None:
    box = own_engine.create()
    box.run(HOLD)
    taken = box.post("snapshots").json()["snapshotID"]
    box.post("pause")

    assert files_with_the_mark(own_engine.state) == []
    assert own_engine.plain_images() == []
    for sandbox in (box, own_engine.create(templateID=taken)):
        sandbox.post("connect", timeout=600)
        assert sandbox.value("mark, open('/home/user/mark').read() == mark * 10000") == f"('{MARK}', True)"
    assert files_with_the_mark(own_engine.state) == []
    with own_engine.http() as http:
        http.delete(f"/templates/{taken}")


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.5, 0.8])
def test_an_engine_killed_in_the_middle_of_a_pause_leaves_nothing_to_be_read_on_the_disk(
    own_engine: EngineProcess, seconds: float
) -> None:
    box = own_engine.create()
    box.run(HOLD + "; blob = b'x' * (150 << 20)")

    def pause() -> None:
        with contextlib.suppress(httpx.TransportError):
            box.post("pause")

    pausing = threading.Thread(target=pause)
    pausing.start()
    time.sleep(seconds)
    own_engine.kill()
    pausing.join()

    assert files_with_the_mark(own_engine.state) == []
    own_engine.start()
    assert own_engine.plain_images() == []
    box.post("connect", timeout=600)
    assert box.value("mark") == MARK


def test_a_snapshot_that_was_put_in_anothers_place_is_refused(own_engine: EngineProcess) -> None:
    mine, theirs = own_engine.create(), own_engine.create()
    theirs.run(HOLD)
    places = []
    for box in (mine, theirs):
        box.post("pause")
        places.append(next((own_engine.state / "snapshots" / box.id).iterdir()))
    shutil.copytree(places[0], own_engine.state / "kept")
    shutil.rmtree(places[0])
    shutil.copytree(places[1], places[0])

    answer = mine.post("connect", timeout=600)

    assert answer.status_code == 500
    assert "moved here" in answer.json()["message"]
    shutil.rmtree(places[0])
    shutil.copytree(own_engine.state / "kept", places[0])
    assert mine.post("connect", timeout=600).status_code == 201


def test_without_its_key_a_snapshot_is_kept_and_with_it_resumed(own_engine: EngineProcess) -> None:
    box = own_engine.create()
    box.run(HOLD)
    box.post("pause")
    own_engine.stop()
    file = own_engine.state / "snapshot.key"
    kept = file.read_text()
    file.unlink()
    own_engine.start()

    answer = box.post("connect", timeout=600)
    assert answer.status_code == 500
    assert "not among those" in answer.json()["message"]
    assert box.info()["state"] == "paused"

    own_engine.stop()
    # A newer key before it: what is there opens, and is under the new one from then on.
    new = base64.b64encode(secrets.token_bytes(32)).decode()
    own_engine.start(SANDBOX_TOOLS_SNAPSHOT_KEY=f"{new} {kept}")
    own_engine.stop()
    own_engine.start(SANDBOX_TOOLS_SNAPSHOT_KEY=new)
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value("mark") == MARK
    assert box.kill() == 204


@contextlib.contextmanager
def plain_engine(state: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(state, options=("--no-encryption",)).start()
    try:
        yield engine
    finally:
        engine.stop()


def test_an_engine_without_encryption_writes_plain_and_each_kind_is_told_from_the_other(templates: Path) -> None:
    with own_state() as state:
        with plain_engine(state) as plain:
            box = plain.create()
            box.run(HOLD)
            box.post("pause")
            assert len(files_with_the_mark(state / "snapshots")) == 1
            assert not (state / "snapshot.key").exists()

        sealing = EngineProcess(state).start()
        box.engine = sealing
        assert box.post("connect", timeout=600).status_code == 201
        assert box.value("mark") == MARK
        box.post("pause")
        assert files_with_the_mark(state) == []
        sealing.stop()

        with plain_engine(state) as plain:
            box.engine = plain
            answer = box.post("connect", timeout=600)
            assert answer.status_code == 500
            assert "go without keys" in answer.json()["message"]
            assert box.kill() == 204


@as_root
def test_where_memory_has_no_room_for_its_image_a_sandbox_is_not_paused_and_goes_on(templates: Path) -> None:
    with own_state() as state:
        memory = state / "memory"
        memory.mkdir()
        small = f'mount -t tmpfs -o size=200m none {memory} && exec "$@"'
        engine = EngineProcess(state, prefix=("unshare", "--mount", "sh", "-c", small, "sh"))
        engine.start(SANDBOX_TOOLS_MEMORY_DIR=str(memory))
        try:
            box = engine.create()
            box.run("import os; kept = 'yes'; blob = os.urandom(100 << 20)")

            answer = box.post("pause")

            assert answer.status_code == 500
            assert "goes on running" in answer.json()["message"]
            assert "larger tmpfs" in answer.json()["message"]
            assert box.value("kept") == "yes"
            box.run("del blob; import gc; gc.collect()")
        finally:
            engine.clear()
            engine.stop()
        assert engine.containers() == []


@as_root
def test_a_sandbox_that_fills_its_memory_is_paused_and_bounded_again_afterwards(own_engine: EngineProcess) -> None:
    """The image in memory counts as the sandbox's: with its bound in force it would be ended for it."""
    box = own_engine.create()
    box.run("blob = b'x' * (1200 << 20); kept = 'yes'")

    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201
    assert box.value("kept, len(blob)") == f"('yes', {1200 << 20})"
    assert box.post("snapshots").status_code in (200, 201)

    (limit,) = {
        file.read_text().strip()
        for name in ("memory.max", "memory.limit_in_bytes")
        for file in Path("/sys/fs/cgroup").glob(f"**/sandbox-tools/{box.id}-*/{name}")
    }
    assert limit == str(2048 << 20)


def test_the_key_is_not_readable_by_others(own_engine: EngineProcess) -> None:
    assert os.stat(own_engine.state / "snapshot.key").st_mode & 0o777 == 0o600
