"""What a watch sees: everything that happens, once, in order, also in directories that are new."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox_tools.guest import watch as watching
from sandbox_tools.guest.accounts import account
from sandbox_tools.guest.uploads import Incoming
from sandbox_tools.guest.watch import CHMOD, CREATE, REMOVE, RENAME, WRITE, Change, EventsLostError, Watch


@pytest_asyncio.fixture
async def watch(tmp_path: Path) -> AsyncIterator[Watch]:
    """A recursive watch of the test's directory."""
    watch = await Watch.open(tmp_path, recursive=True)
    yield watch
    watch.close()


def seen(watch: Watch) -> list[tuple[str, str]]:
    """What has happened, as short as a test can read it."""
    return [(change.name, change.kind) for change in watch.take()]


async def test_each_thing_that_can_happen_to_a_file_has_its_kind(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    assert seen(watch) == [("a", CREATE), ("a", WRITE)]
    (tmp_path / "a").chmod(0o600)
    assert seen(watch) == [("a", CHMOD)]
    (tmp_path / "a").rename(tmp_path / "b")
    assert seen(watch) == [("a", RENAME), ("b", CREATE)]
    (tmp_path / "b").unlink()
    assert ("b", REMOVE) in seen(watch)
    assert seen(watch) == []


async def test_what_comes_in_with_a_new_directory_is_seen_once(watch: Watch, tmp_path: Path) -> None:
    """Some of it is there before the directory can be watched."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "b" / "c" / "late").touch()

    created = sorted(name for name, kind in seen(watch) if kind == CREATE)

    assert created == ["a", "a/b", "a/b/c", "a/b/c/late", "a/b/file"]
    (tmp_path / "a" / "b" / "c" / "late").write_text("x")
    assert seen(watch) == [("a/b/c/late", WRITE)]


async def test_a_file_that_comes_in_with_a_new_directory_is_seen_as_written(watch: Watch, tmp_path: Path) -> None:
    """An upload that makes its parents is over before the directory can be watched."""
    file = Incoming(tmp_path / "new" / "file", account(), {})
    file.write(b"content")
    file.finish()

    changes = seen(watch)

    assert [change for change in changes if change[1] != CHMOD][:3] == [
        ("new", CREATE),
        ("new/file", CREATE),
        ("new/file", WRITE),
    ]
    assert changes.count(("new/file", CREATE)) == 1


async def test_a_directory_is_followed_where_it_is_moved_within(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    seen(watch)

    (tmp_path / "a").rename(tmp_path / "other" / "b")
    assert seen(watch) == [("a", RENAME), ("other/b", CREATE)]
    (tmp_path / "other" / "b" / "deep" / "file").touch()
    assert ("other/b/deep/file", CREATE) in seen(watch)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "new").touch()
    assert [event for event in seen(watch) if event[1] == CREATE] == [("a", CREATE), ("a/new", CREATE)]


async def test_a_directory_is_not_followed_out_and_is_announced_with_all_in_it_when_it_comes_in(
    tmp_path: Path,
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "a" / "deep").mkdir(parents=True)
    outside.mkdir()
    watch = await Watch.open(inside, recursive=True)

    (inside / "a").rename(outside / "a")
    assert seen(watch) == [("a", RENAME)]
    (outside / "a" / "deep" / "secret").touch()
    assert seen(watch) == []
    (outside / "a").rename(inside / "back")
    assert sorted(seen(watch)) == [(name, CREATE) for name in ("back", "back/deep", "back/deep/secret")]
    (inside / "back" / "deep" / "more").touch()
    assert ("back/deep/more", CREATE) in seen(watch)
    watch.close()


async def test_without_recursion_only_the_directory_itself_is_seen(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    watch = await Watch.open(tmp_path, recursive=False)

    (tmp_path / "sub" / "file").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()

    assert seen(watch) == [("new", CREATE)]
    watch.close()


async def test_links_are_not_gone_through(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    watch = await Watch.open(tmp_path / "in", recursive=True)

    (tmp_path / "in" / "second").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "file").touch()

    assert seen(watch) == [("second", CREATE)]
    watch.close()


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("content", [b"", b"content"])
async def test_an_upload_is_seen_as_if_it_were_written_in_its_place(
    watch: Watch, tmp_path: Path, before: bytes | None, content: bytes
) -> None:
    """SDKs' users wait for a WRITE; a file that is replaced is not created."""
    if before is not None:
        (tmp_path / "file").write_bytes(before)
        seen(watch)

    file = Incoming(tmp_path / "file", account(), {})
    file.write(content)
    file.finish()
    broken = Incoming(tmp_path / "other", account(), {})
    broken.write(b"half")
    broken.abandon()

    assert seen(watch) == ([("file", CREATE)] if before is None else []) + [("file", WRITE)]


async def test_a_watch_whose_directory_goes_away_says_so_and_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    watch = await Watch.open(tmp_path / "a", recursive=True)

    (tmp_path / "a").rmdir()

    async with asyncio.timeout(30):
        assert await watch.wait()
        assert seen(watch) == [(".", REMOVE)]
        assert not await watch.wait()
    watch.close()


async def test_a_watch_that_ends_lets_its_reader_go(watch: Watch) -> None:
    waiting = asyncio.create_task(watch.wait())
    await asyncio.sleep(0)

    watch.close()

    assert await asyncio.wait_for(waiting, 30) is False


async def test_past_its_bound_a_watch_says_that_it_lost_some_and_goes_on(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "QUEUED", 5)
    for number in range(10):
        (tmp_path / str(number)).touch()

    async with asyncio.timeout(30):
        await watch.wait()
    with pytest.raises(EventsLostError):
        watch.take()
    (tmp_path / "next").touch()

    assert ("next", CREATE) in seen(watch)


async def test_a_name_that_is_no_text_is_seen_by_its_bytes(watch: Watch, tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff\xfe", "wb"):
        pass

    assert os.fsencode(watch.take()[0].name) == b"\xff\xfe"


@pytest.mark.parametrize("seed", range(6))
async def test_whoever_follows_the_events_knows_the_tree(watch: Watch, tmp_path: Path, seed: int) -> None:
    """Names appear and disappear as they do on disk, whatever happens in whatever order, read at whatever time."""
    chance = random.Random(seed)
    known: set[str] = set()

    def follow(changes: list[Change]) -> None:
        for change in changes:
            if change.kind == CREATE:
                # Of a directory that is moved within the tree, only its own name is told.
                known.update(str(each.relative_to(tmp_path)) for each in (tmp_path / change.name).rglob("*"))
                known.add(change.name)
            elif change.kind in (REMOVE, RENAME):
                known.difference_update([name for name in known if f"{name}/".startswith(f"{change.name}/")])

    for _ in range(300):
        directories = [tmp_path, *(each for each in tmp_path.rglob("*") if each.is_dir())]
        where, name = chance.choice(directories), chance.choice("abcd")
        match chance.choice(["touch", "mkdir", "mkdirs", "move", "move", "remove", "look"]):
            case "touch" if not (where / name).is_dir():
                (where / name).write_text("x")
            case "mkdir":
                if not (where / name).exists():
                    (where / name).mkdir()
            case "mkdirs" if not (where / name).exists():
                (where / name / "x" / "y").mkdir(parents=True)
            case "move":
                source = chance.choice(directories)
                if source != tmp_path and not (where / name).exists() and source not in (where, *where.parents):
                    source.rename(where / name)
            case "remove" if where != tmp_path:
                shutil.rmtree(where)
            case "look":
                follow(watch.take())
    follow(watch.take())

    assert known == {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")}


async def test_a_closed_watch_keeps_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        (await Watch.open(tmp_path, recursive=True)).close()
        with pytest.raises(NotADirectoryError):
            await Watch.open(Path("/etc/hostname"), recursive=True)

    assert len(os.listdir("/proc/self/fd")) == before
