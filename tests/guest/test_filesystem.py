"""What `filesystem.Filesystem` promises, over a real connection, in JSON as SDKs send it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_tools.guest import envd, filesystem
from sandbox_tools.guest.entries import FIRST_SECOND, LAST_SECOND, permissions, timestamp
from sandbox_tools.guest.envelopes import envelope
from sandbox_tools.guest.filesystem import WATCHERS
from sandbox_tools.guest.settings import Settings

from .conftest import served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """One envd for all tests of the module."""
    async with served(envd.create_app(Settings()), tmp_path_factory.mktemp("envd") / "http.sock") as client:
        yield client


async def call(http: httpx.AsyncClient, method: str, **message: Any) -> Any:
    """The answer of a method, or the code of its error."""
    answer = await http.post(f"/filesystem.Filesystem/{method}", json=message)
    if answer.status_code == 200:
        return answer.json()

    assert answer.status_code < 500, answer.text
    assert answer.json()["message"]
    return answer.json()["code"]


async def entry_of(http: httpx.AsyncClient, path: Path) -> Any:
    """What `Stat` tells."""
    return (await call(http, "Stat", path=str(path)))["entry"]


async def test_a_file_is_told_about_with_all_that_is_known(http: httpx.AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    path.chmod(0o640)
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))

    entry = await entry_of(http, path)

    assert entry == {
        "name": "file",
        "type": "FILE_TYPE_FILE",
        "path": str(path),
        "size": "5",
        "mode": 0o640,
        "permissions": "-rw-r-----",
        "owner": path.owner(),
        "group": path.group(),
        "modifiedTime": "2023-11-14T22:13:20.123456789Z",
    }


async def test_a_link_is_told_about_itself_but_for_what_it_leads_to(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir(mode=0o751)
    (tmp_path / "second").symlink_to("directory")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")

    first, dangling, loop = [await entry_of(http, tmp_path / name) for name in ("first", "dangling", "loop")]

    assert (first["type"], first["mode"], first["symlinkTarget"]) == (
        "FILE_TYPE_DIRECTORY",
        0o751,
        str(tmp_path.resolve() / "directory"),
    )
    assert (first["permissions"], first["size"]) == ("Lrwxrwxrwx", str(len("second")))
    assert dangling["type"] == loop["type"] == "FILE_TYPE_UNSPECIFIED"
    assert dangling["symlinkTarget"] == str(tmp_path.resolve() / "nowhere")


async def test_what_was_attached_at_an_upload_is_told_and_moves_along(http: httpx.AsyncClient, tmp_path: Path) -> None:
    headers = {"content-type": "application/octet-stream", "x-metadata-author": "ann"}
    answer = await http.post("/files", params={"path": str(tmp_path / "a")}, content=b"", headers=headers)
    if answer.status_code == 400:
        pytest.skip("the file system of the tests has no extended attributes")
    os.setxattr(tmp_path / "a", "user.other", b"not ours")

    moved = await call(http, "Move", source=str(tmp_path / "a"), destination=str(tmp_path / "b"))

    assert moved["entry"]["metadata"] == {"author": "ann"}
    (listed,) = (await call(http, "ListDir", path=str(tmp_path)))["entries"]
    assert listed["metadata"] == {"author": "ann"}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (stat.S_IFREG | 0o644, "-rw-r--r--"),
        (stat.S_IFDIR | 0o755, "drwxr-xr-x"),
        (stat.S_IFDIR | 0o1777, "dtrwxrwxrwx"),
        (stat.S_IFREG | 0o6755, "ugrwxr-xr-x"),
        (stat.S_IFLNK | 0o777, "Lrwxrwxrwx"),
        (stat.S_IFCHR | 0o620, "Dcrw--w----"),
        (stat.S_IFBLK | 0o660, "Drw-rw----"),
        (stat.S_IFIFO | 0o600, "prw-------"),
        (stat.S_IFSOCK | 0o755, "Srwxr-xr-x"),
        (stat.S_IFREG, "----------"),
    ],
)
async def test_permissions_are_written_as_go_does(mode: int, expected: str) -> None:
    """`fs.FileMode.String`: letters of `dalTLDpSugct?` by the bits that are set, then nine for the permissions."""
    assert permissions(mode) == expected


@given(st.integers(-(2**80), 2**80))
async def test_any_time_is_a_timestamp(nanoseconds: int) -> None:
    told = timestamp(nanoseconds)

    assert 20 <= len(told) <= 30
    assert told.endswith("Z")
    if FIRST_SECOND * 10**9 <= nanoseconds < (LAST_SECOND + 1) * 10**9:
        assert int(told[:4]) in range(1, 10000)
    assert timestamp(0) == "1970-01-01T00:00:00Z"


async def test_directories_are_made_with_their_parents_once(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")

    made = await call(http, "MakeDir", path=f"{tmp_path}/a/b/c/")

    assert (made["entry"]["path"], made["entry"]["permissions"]) == (f"{tmp_path}/a/b/c", "drwxr-xr-x")
    assert await call(http, "MakeDir", path=f"{tmp_path}/a/b/c") == "already_exists"
    assert await call(http, "MakeDir", path=f"{tmp_path}/a") == "already_exists"
    for path in ("file", "file/below", "dangling"):
        assert await call(http, "MakeDir", path=f"{tmp_path}/{path}") == "invalid_argument"


async def test_a_move_makes_parents_and_replaces(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "dir").mkdir()

    async def move(source: str, destination: str) -> Any:
        return await call(http, "Move", source=f"{tmp_path}/{source}", destination=f"{tmp_path}/{destination}")

    assert (await move("a", "new/parents/a"))["entry"]["path"] == f"{tmp_path}/new/parents/a"
    assert (await move("new/parents/a", "b"))["entry"]["name"] == "b"
    assert (tmp_path / "b").read_text() == "a"
    assert await move("missing", "c") == "not_found"
    assert await move("dir", "b") == "invalid_argument"
    assert await move("b", "dir") == "invalid_argument"
    assert await move("full", "full/below") == "invalid_argument"
    assert await move("dir", "full") == "failed_precondition"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "dir", "full", "new"]


@pytest.mark.skipif(
    not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="needs a second file system that can be written to",
)
async def test_a_move_to_another_file_system_takes_everything_along(
    http: httpx.AsyncClient, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path / "tree"
    (source / "below").mkdir(parents=True)
    (source / "below" / "file").write_text("text")
    (source / "below" / "file").chmod(0o600)
    (source / "link").symlink_to("below/file")
    destination = Path("/dev/shm") / f"moved-{os.getpid()}" / "tree"
    try:
        moved = await call(http, "Move", source=str(source), destination=str(destination))

        assert moved["entry"]["type"] == "FILE_TYPE_DIRECTORY"
        assert os.readlink(destination / "link") == "below/file"
        assert (destination / "link").read_text() == "text"
        assert stat.S_IMODE((destination / "below" / "file").stat().st_mode) == 0o600
        assert not source.exists()
        assert [path.name for path in destination.parent.iterdir()] == ["tree"]
        source.mkdir()
        assert await call(http, "Move", source=str(source), destination=str(destination)) == "failed_precondition"
        assert source.exists()
        assert [path.name for path in destination.parent.iterdir()] == ["tree"]
    finally:
        await call(http, "Remove", path=str(destination.parent))


async def test_a_list_goes_as_deep_as_asked_in_order(http: httpx.AsyncClient, tmp_path: Path) -> None:
    for name in ("b/y/deep", "b/x", "a", "c/z"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b" / "file").touch()
    (tmp_path / "link").symlink_to("b")

    async def listed(**more: Any) -> Any:
        answer = await call(http, "ListDir", path=str(tmp_path), **more)
        return [entry["path"].removeprefix(f"{tmp_path}/") for entry in answer["entries"]]

    assert await listed() == await listed(depth=0) == await listed(depth=1) == ["a", "b", "c", "link"]
    assert await listed(depth="2") == ["a", "b", "b/file", "b/x", "b/y", "c", "c/z", "link"]
    assert "b/y/deep" in await listed(depth=4_000_000_000)
    through_link = await call(http, "ListDir", path=f"{tmp_path}/link")
    assert [entry["path"] for entry in through_link["entries"]] == [
        f"{tmp_path}/link/{name}" for name in ("file", "x", "y")
    ]
    assert await call(http, "ListDir", path=f"{tmp_path}/b/file") == "invalid_argument"
    assert await call(http, "ListDir", path=f"{tmp_path}/missing") == "not_found"


async def test_a_list_that_is_too_long_is_refused(
    http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "LISTED", 3)
    for number in range(4):
        (tmp_path / str(number)).touch()

    assert await call(http, "ListDir", path=str(tmp_path)) == "failed_precondition"


async def test_even_what_changes_all_the_time_can_be_listed(http: httpx.AsyncClient) -> None:
    assert len((await call(http, "ListDir", path="/proc/self", depth=3))["entries"]) > 10


async def test_remove_takes_trees_and_links_and_what_is_not_there(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "-rf").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")

    for name in ("a", "link", "missing", "missing/below", "kept/file/below"):
        assert await call(http, "Remove", path=f"{tmp_path}/{name}") == {}

    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["kept", "kept/file"]


async def test_a_directory_can_be_removed_however_deep_it_is(http: httpx.AsyncClient, tmp_path: Path) -> None:
    """Deeper than any path is long, and than Python recurses."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)

    listed = await call(http, "ListDir", path=str(tmp_path), depth=5000)
    assert await call(http, "Remove", path=f"{tmp_path}/deeper") == {}

    assert listed == "invalid_argument" or len(listed["entries"]) > 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/missing", "not_found"),
        ("/etc/hostname/below", "not_found"),
        ("n" * 300, "invalid_argument"),
        ("n/" * 4000, "invalid_argument"),
        ("a\0b", "invalid_argument"),
        ("~somebody/x", "invalid_argument"),
        (5, "invalid_argument"),
        (["/"], "invalid_argument"),
        (None, "invalid_argument"),
    ],
)
async def test_what_cannot_be_there_is_refused_by_a_code(http: httpx.AsyncClient, path: Any, code: str) -> None:
    assert await call(http, "Stat", path=path) == code


async def test_paths_begin_at_home(http: httpx.AsyncClient) -> None:
    home = (await call(http, "Stat", path="~"))["entry"]["path"]

    for path in ("", ".", "~/", "./x/.."):
        assert (await call(http, "Stat", path=path))["entry"]["path"] == home
    assert (await call(http, "Stat"))["entry"]["path"] == home


async def test_an_unknown_user_is_refused(http: httpx.AsyncClient) -> None:
    headers = {"authorization": "Basic " + base64.b64encode(b"nobody-of-this-name:").decode()}

    answer = await http.post("/filesystem.Filesystem/Stat", json={"path": "/"}, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


async def test_a_watcher_that_is_asked_gives_each_event_once(http: httpx.AsyncClient, tmp_path: Path) -> None:
    number = (await call(http, "CreateWatcher", path=str(tmp_path), recursive=True, includeEntry=True))["watcherId"]

    assert await call(http, "GetWatcherEvents", watcherId=number) == {"events": []}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("text")
    events = (await call(http, "GetWatcherEvents", watcherId=number))["events"]
    assert {"name": "sub/file", "type": "EVENT_TYPE_CREATE"}.items() <= events[1].items()
    assert events[1]["entry"]["size"] == "4"
    assert await call(http, "GetWatcherEvents", watcherId=number) == {"events": []}

    assert await call(http, "RemoveWatcher", watcherId=number) == {}
    assert await call(http, "GetWatcherEvents", watcherId=number) == "not_found"
    assert await call(http, "RemoveWatcher", watcherId=number) == "not_found"


@pytest.mark.parametrize("method", ["CreateWatcher", "ListDir"])
async def test_only_directories_are_watched_and_listed(http: httpx.AsyncClient, tmp_path: Path, method: str) -> None:
    (tmp_path / "file").touch()

    assert await call(http, method, path=str(tmp_path / "file")) == "invalid_argument"
    assert await call(http, method, path=str(tmp_path / "missing")) == "not_found"
    assert await call(http, method, path=str(tmp_path / ("n" * 300))) == "invalid_argument"


async def test_watchers_that_nobody_removes_are_bounded(http: httpx.AsyncClient, tmp_path: Path) -> None:
    made = []
    while isinstance(answer := await call(http, "CreateWatcher", path=str(tmp_path)), dict):
        made.append(answer["watcherId"])
        assert len(made) <= WATCHERS

    assert answer == "resource_exhausted"
    for number in made:
        assert await call(http, "RemoveWatcher", watcherId=number) == {}


async def messages(answer: httpx.Response) -> AsyncIterator[Any]:
    """A stream's messages; the last is what the end says."""
    data = b""
    async for piece in answer.aiter_bytes():
        data += piece
        while len(data) >= 5 and len(data) >= 5 + int.from_bytes(data[1:5]):
            length = int.from_bytes(data[1:5])
            yield json.loads(data[5 : 5 + length])
            data = data[5 + length :]


async def test_a_watch_that_streams_begins_with_start_and_ends_at_its_deadline(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    headers = {"content-type": "application/connect+json", "connect-timeout-ms": "700"}
    body = envelope({"path": str(tmp_path)})

    async with (
        asyncio.timeout(30),
        http.stream("POST", "/filesystem.Filesystem/WatchDir", content=body, headers=headers) as answer,
    ):
        found = messages(answer)
        assert await anext(found) == {"start": {}}
        (tmp_path / "file").touch()
        assert await anext(found) == {"filesystem": {"name": "file", "type": "EVENT_TYPE_CREATE"}}
        rest = [message async for message in found]

    assert rest[-1]["error"]["code"] == "deadline_exceeded"


async def test_a_silent_watch_sends_keepalives(http: httpx.AsyncClient, tmp_path: Path) -> None:
    headers = {"content-type": "application/connect+json", "keepalive-ping-interval": "1"}
    body = envelope({"path": str(tmp_path), "recursive": True})

    async with (
        asyncio.timeout(30),
        http.stream("POST", "/filesystem.Filesystem/WatchDir", content=body, headers=headers) as answer,
    ):
        found = messages(answer)
        assert [await anext(found), await anext(found)] == [{"start": {}}, {"keepalive": {}}]


@pytest.mark.parametrize(("path", "code"), [("file", "invalid_argument"), ("missing", "not_found")])
async def test_a_watch_that_cannot_begin_says_why_at_its_end(
    http: httpx.AsyncClient, tmp_path: Path, path: str, code: str
) -> None:
    (tmp_path / "file").touch()
    headers = {"content-type": "application/connect+json"}
    body = envelope({"path": f"{tmp_path}/{path}"})

    answer = await http.post("/filesystem.Filesystem/WatchDir", content=body, headers=headers)

    assert answer.status_code == 200
    assert json.loads(answer.content[5:])["error"]["code"] == code


async def test_a_watcher_that_leaves_keeps_nothing_open(http: httpx.AsyncClient, tmp_path: Path) -> None:
    headers = {"content-type": "application/connect+json"}
    body = envelope({"path": str(tmp_path)})
    before = inotifies()
    for _ in range(5):
        async with http.stream("POST", "/filesystem.Filesystem/WatchDir", content=body, headers=headers) as answer:
            assert await anext(messages(answer)) == {"start": {}}

    async with asyncio.timeout(30):
        while inotifies() > before:
            await asyncio.sleep(0.01)


def inotifies() -> int:
    """How many this process holds open."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += "inotify" in os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
    return found


NAMES = st.one_of(
    st.sampled_from(["a", "b", "..", ".", "", "~", "link", "loop", "n" * 256, "\0", "\u00e4", " "]), st.text(max_size=8)
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, max_size=6),
    method=st.sampled_from(["Stat", "ListDir", "MakeDir", "CreateWatcher"]),
    more=st.dictionaries(st.sampled_from(["depth", "recursive", "includeEntry"]), st.integers() | st.booleans()),
)
async def test_no_path_is_too_strange_to_be_answered(
    http: httpx.AsyncClient, tmp_path: Path, names: list[str], method: str, more: dict[str, Any]
) -> None:
    """Each is done or refused by a code that is the caller's fault; nothing appears beside the test's directory."""
    root = tmp_path / "d" / "e" / "e" / "p" / "x" / "y"
    root.mkdir(parents=True, exist_ok=True)
    for link in ("link", "loop"):
        if not (root / link).is_symlink():
            (root / link).symlink_to(link if link == "loop" else root)
    before = sorted(tmp_path.parent.iterdir())

    answer = await call(http, method, path=f"{root}/{'/'.join(names)}", **more)

    if isinstance(answer, dict) and method == "CreateWatcher":
        await call(http, "RemoveWatcher", watcherId=answer["watcherId"])
    assert isinstance(answer, dict) or answer in ("invalid_argument", "not_found", "already_exists")
    assert sorted(tmp_path.parent.iterdir()) == before
