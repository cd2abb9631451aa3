"""What `/files` promises: bytes come out as they went in, whole or not at all, and nonsense is refused by name."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_tools.guest import envd
from sandbox_tools.guest.files import CHUNK
from sandbox_tools.guest.settings import Settings
from sandbox_tools.guest.uploads import UNFINISHED

from .conftest import served

pytestmark = pytest.mark.asyncio(loop_scope="module")

OCTETS = {"content-type": "application/octet-stream"}

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """One envd for all tests of the module."""
    async with served(envd.create_app(Settings()), tmp_path_factory.mktemp("envd") / "http.sock") as client:
        yield client


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A directory with one of everything in it."""
    root = tmp_path / "zoo"
    (root / "directory").mkdir(parents=True)
    (root / "file").write_text("text")
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere/at/all")
    return root


def noise(size: int) -> bytes:
    """Bytes that look like nothing else."""
    return hashlib.shake_256(str(size).encode()).digest(size)


def unfinished(directory: Path) -> list[Path]:
    """What uploads have left behind."""
    return list(directory.rglob(f"{UNFINISHED}*"))


async def put(http: httpx.AsyncClient, path: Any, content: Any, **more: Any) -> httpx.Response:
    """An upload of one raw body."""
    headers = {**OCTETS, **more.pop("headers", {})}
    return await http.post("/files", params={"path": str(path), **more}, content=content, headers=headers)


async def get(http: httpx.AsyncClient, path: Any, **headers: str) -> httpx.Response:
    """A download."""
    return await http.get("/files", params={"path": str(path)}, headers=headers)


@pytest.mark.parametrize("size", SIZES)
async def test_what_is_written_is_read(http: httpx.AsyncClient, tmp_path: Path, size: int) -> None:
    path = tmp_path / "some" / "new" / "file.bin"

    answer = await put(http, path, noise(size))

    assert (answer.status_code, answer.json()) == (200, [{"path": str(path), "name": "file.bin", "type": "file"}])
    assert path.read_bytes() == noise(size)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    read = await get(http, path)
    assert (read.status_code, read.content, read.headers["content-length"]) == (200, noise(size), str(size))
    assert "content-encoding" not in read.headers
    assert unfinished(tmp_path) == []


async def pieces(data: bytes, size: int) -> Any:
    """A body without a length, which is sent in chunks."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def test_every_flavour_of_upload_arrives(http: httpx.AsyncClient, tmp_path: Path) -> None:
    """PROTOCOL 4.5: forms with and without a path, raw bodies with a length, chunked and gzipped."""
    data = noise(CHUNK + 99)
    form: Any = {"file": (str(tmp_path / "named"), data)}
    answers = [
        await http.post("/files", files=form),
        await http.post("/files", files={"file": ("any", data)}, params={"path": str(tmp_path / "by-path")}),
        await http.post("/files", files=[("other", b"x"), ("file", (str(tmp_path / "second"), data))]),
        await put(http, tmp_path / "raw", data),
        await put(http, tmp_path / "chunked", pieces(data, 10_000)),
        await put(http, tmp_path / "gzipped", gzip.compress(data), headers={"content-encoding": "gzip"}),
        await put(
            http,
            tmp_path / "members",
            pieces(gzip.compress(data[:1000]) + gzip.compress(data[1000:]), 777),
            headers={"content-encoding": "gzip"},
        ),
    ]
    request = http.build_request("POST", "/files", files={"file": (str(tmp_path / "gzipped form"), data)})
    headers = {**request.headers, "content-encoding": "gzip"}
    del headers["content-length"]
    answers.append(
        await http.post("/files", content=pieces(gzip.compress(await request.aread()), 500), headers=headers)
    )

    assert [answer.status_code for answer in answers] == [200] * len(answers), [answer.text for answer in answers]
    names = {"named", "by-path", "second", "raw", "chunked", "gzipped", "members", "gzipped form"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} >= names
    assert all((tmp_path / name).read_bytes() == data for name in names)


async def test_many_files_come_in_one_form(http: httpx.AsyncClient, tmp_path: Path) -> None:
    paths = [tmp_path / "d" / f"{number} ä \u4e2d ' %22 \\" for number in range(30)]

    answer = await http.post("/files", files=[("file", (str(path), path.name.encode())) for path in paths])

    assert [entry["path"] for entry in answer.json()] == [str(path) for path in paths]
    assert all(path.read_text() == path.name for path in paths)


@pytest.mark.parametrize("boundary", ["a", "---------------------------0123456789", "'()+_,-./:=?"])
@pytest.mark.parametrize("step", [1, 7, 10_000])
async def test_a_form_is_read_however_it_is_cut(
    http: httpx.AsyncClient, tmp_path: Path, boundary: str, step: int
) -> None:
    data = b"\r\n--" + boundary.encode()[:-1] + b"\r\n--\r\r\n\n" + boundary.encode()
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{tmp_path}/cut"\r\n'
        "Content-Type: text/plain\r\n\r\n"
    ).encode()
    body += data + f"\r\n--{boundary}--\r\n".encode()

    answer = await http.post(
        "/files",
        content=pieces(body, step),
        headers={"content-type": f'multipart/form-data; boundary="{boundary}"'},
    )

    assert answer.status_code == 200, answer.text
    assert (tmp_path / "cut").read_bytes() == data


async def test_a_file_that_is_there_is_replaced_and_keeps_its_mode(http: httpx.AsyncClient, tmp_path: Path) -> None:
    """All but what would let the new content run as the owner of the old."""
    path = tmp_path / "tool"
    path.write_text("a longer text that was there before")
    path.chmod(0o6751)

    assert (await put(http, path, b"new")).status_code == 200

    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o751


async def test_a_link_is_followed_and_stays_a_link(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("away/there")

    assert (await put(http, tmp_path / "link", b"new")).status_code == 200

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "away" / "there").read_text() == "new"
    assert (await get(http, tmp_path / "link")).content == b"new"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "multipart/form-data"},
        {"content-type": "multipart/form-data; boundary="},
        {"content-type": "multipart/form-data; boundary=" + "x" * 5000},
        {"content-type": "multipart/form-data; boundary=x"},
        {**OCTETS, "content-encoding": "br"},
        {**OCTETS, "content-encoding": "gzip"},
        {**OCTETS, "x-metadata-": "v"},
        {**OCTETS, "x-metadata-" + "k" * 247: "v"},
        {**OCTETS, "x-metadata-k": "\u00fc".encode()},
        {**OCTETS, "x-metadata-k": "v" * 4096},
    ],
)
async def test_a_body_that_is_not_what_its_headers_say_is_refused_and_nothing_is_written(
    http: httpx.AsyncClient, tmp_path: Path, headers: Any
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    answer = await http.post("/files", params={"path": str(path)}, content=b"new", headers=headers)

    assert answer.status_code == answer.json()["code"] == 400
    assert path.read_text() == "before"
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("cut", [10, 200, -1])
async def test_a_form_or_a_gzip_that_ends_early_replaces_nothing(
    http: httpx.AsyncClient, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    request = http.build_request("POST", "/files", files={"file": (str(path), noise(1000))})
    form = (await request.aread()).removesuffix(b"--\r\n")
    headers = {"content-type": request.headers["content-type"]}

    answers = [
        await http.post("/files", content=form[:cut], headers=headers),
        await put(http, path, gzip.compress(noise(1000))[:cut], headers={"content-encoding": "gzip"}),
    ]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert path.read_text() == "before"
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
async def test_an_upload_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path: Path, framing: str) -> None:
    """Neither half a file under its name, nor what had come of it."""
    path = tmp_path / "file"
    path.write_text("before")
    async with served(envd.create_app(Settings()), tmp_path / "http.sock") as http:
        _, writer = await asyncio.open_unix_connection(tmp_path / "http.sock")
        kind = "Content-Type: application/octet-stream"
        head = f"POST /files?path={path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n{kind}\r\n\r\n"
        half = noise(5000) if framing.startswith("Content") else b"1388\r\n" + noise(5000) + b"\r\n"
        writer.write(head.encode() + half)
        async with asyncio.timeout(30):
            while not unfinished(tmp_path) or unfinished(tmp_path)[0].stat().st_size < 5000:
                await asyncio.sleep(0.01)
            writer.close()
            while unfinished(tmp_path):
                await asyncio.sleep(0.01)

        assert path.read_text() == "before"
        assert (await get(http, path)).text == "before"


async def test_two_files_for_one_place_are_refused(http: httpx.AsyncClient, tmp_path: Path) -> None:
    twice: Any = [("file", (str(tmp_path / "a"), b"1")), ("file", (f"{tmp_path}/x/../a", b"2"))]

    answer = await http.post("/files", files=twice)
    with_path = await http.post("/files", files=twice, params={"path": str(tmp_path / "b")})

    assert (answer.status_code, with_path.status_code) == (400, 400)
    assert "twice" in answer.json()["message"]
    assert unfinished(tmp_path) == []


async def test_metadata_is_kept_with_the_file_and_replaced_with_it(http: httpx.AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    headers = {"X-Metadata-Author": "ann", "x-metadata-a.b_c": "  two words; = ~".strip()}

    answer = await put(http, path, b"1", headers=headers)

    expected = {"author": "ann", "a.b_c": "two words; = ~"}
    if answer.status_code == 400 and "file system" in answer.text:
        pytest.skip("the file system of the tests has no extended attributes")
    assert answer.json()[0]["metadata"] == expected
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == {
        f"user.e2b.{key}": value.encode() for key, value in expected.items()
    }

    assert "metadata" not in (await put(http, path, b"2")).json()[0]
    assert os.listxattr(path) == []


@pytest.mark.parametrize("size", [10, 3 * CHUNK + 7])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=2-5", slice(2, 6)),
        ("bytes=3-", slice(3, None)),
        ("bytes=-4", slice(-4, None)),
        ("bytes=-99999999", slice(None)),
        ("bytes=5-99999999", slice(5, None)),
        (f"bytes={CHUNK - 2}-{CHUNK + 2}", slice(CHUNK - 2, CHUNK + 3)),
        (f"bytes={CHUNK}-", slice(CHUNK, None)),
    ],
)
async def test_a_range_is_the_part_that_it_names(
    http: httpx.AsyncClient, tmp_path: Path, size: int, asked: str, expected: slice
) -> None:
    data = noise(size)
    (tmp_path / "file").write_bytes(data)
    part = data[expected]

    answer = await get(http, tmp_path / "file", range=asked)

    if part:
        first, _, total = answer.headers["content-range"].removeprefix("bytes ").replace("/", "-").split("-")
        assert (answer.status_code, answer.content) == (206, part)
        assert (data[int(first) :][: len(part)], int(total)) == (part, size)
    else:
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,3-4", "bytes=x", "bytes=" + "9" * 99]
)
async def test_a_range_that_cannot_be_read_is_ignored(http: httpx.AsyncClient, tmp_path: Path, asked: str) -> None:
    (tmp_path / "file").write_text("0123456789")

    answer = await get(http, tmp_path / "file", range=asked)

    assert (answer.status_code, answer.text) == (200, "0123456789")


async def test_a_download_goes_on_only_in_the_same_version_of_a_file(http: httpx.AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("0123456789")
    modified = (await get(http, path)).headers["last-modified"]

    same = await get(http, path, **{"range": "bytes=5-", "if-range": modified})
    os.utime(path, (1, 1))
    other = await get(http, path, **{"range": "bytes=5-", "if-range": modified})

    assert (same.status_code, same.text, other.status_code, other.text) == (206, "56789", 200, "0123456789")


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("gzip, deflate, br", None),
        ("gzip", None),
        ("*", None),
        ("", None),
        ("identity;q=0, gzip", "gzip"),
        ("gzip;q=1.0, *;q=0", "gzip"),
        ("*;q=0", 406),
        ("identity;q=0", 406),
        ("identity;q=0, gzip;q=nonsense", "gzip"),
    ],
)
async def test_a_file_is_compressed_only_for_who_takes_nothing_else(
    http: httpx.AsyncClient, tmp_path: Path, accepted: str, expected: Any
) -> None:
    (tmp_path / "file").write_bytes(b"text" * CHUNK)

    answer = await get(http, tmp_path / "file", **{"accept-encoding": accepted})

    if expected == 406:
        assert answer.status_code == answer.json()["code"] == 406
    else:
        assert (answer.status_code, answer.headers.get("content-encoding")) == (200, expected)
        assert answer.content == b"text" * CHUNK


async def test_a_head_tells_of_a_file_what_a_get_would(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "a ü.txt").write_text("text")
    params = {"path": str(tmp_path / "a ü.txt")}

    whole, head = await http.get("/files", params=params), await http.head("/files", params=params)

    told = ("content-length", "last-modified", "content-disposition", "content-type", "accept-ranges")
    assert head.content == b""
    assert [head.headers[name] for name in told] == [whole.headers[name] for name in told]
    assert head.headers["content-disposition"] == "inline; filename*=utf-8''a%20%C3%BC.txt"
    assert (await http.head("/files", params={"path": str(tmp_path / "none")})).status_code == 404


async def test_a_file_that_claims_to_be_empty_is_read_nevertheless(http: httpx.AsyncClient) -> None:
    assert (await get(http, "/proc/self/status")).text.startswith("Name:")


async def test_a_file_that_shrinks_while_it_is_read_breaks_the_stream(http: httpx.AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 30)

    async with http.stream("GET", "/files", params={"path": str(path)}) as answer:
        assert answer.headers["content-length"] == str(1 << 30)
        os.truncate(path, CHUNK)
        with pytest.raises(httpx.RemoteProtocolError):
            await answer.aread()


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("missing", 404, "does not exist"),
        ("a/b", 404, "does not exist"),
        ("file/below", 400, "not a directory"),
        ("directory", 400, "is a directory"),
        ("", 400, "is a directory"),
        ("pipe", 400, "not a regular file"),
        ("/dev/null", 400, "not a regular file"),
        ("loop", 400, "symbolic links"),
        ("dangling", 404, "does not exist"),
        ("n" * 300, 400, "longer"),
        ("n/" * 4000, 400, "longer"),
        ("nul\0", 400, "NUL"),
        ("~other/file", 400, "home"),
    ],
)
async def test_what_cannot_be_read_is_refused_in_words(
    http: httpx.AsyncClient, zoo: Path, path: str, status: int, words: str
) -> None:
    whole = path if path.startswith(("/", "~")) or "nul" in path else f"{zoo}/{path}"

    answer = await get(http, whole)

    assert (answer.status_code, answer.json()["code"]) == (status, status), answer.text
    assert words in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("file/below", 400),
        ("directory", 400),
        ("", 400),
        ("pipe", 400),
        ("/dev/null", 400),
        ("/proc/new", 404),
        ("loop", 400),
        ("loop/below", 400),
        ("n" * 300, 400),
        ("directory/" + "n" * 300 + "/file", 400),
        ("n/" * 4000, 400),
        ("nul\0", 400),
        ("\0", 400),
        ("~other/file", 400),
    ],
)
async def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    http: httpx.AsyncClient, zoo: Path, path: str, status: int
) -> None:
    whole = path if path.startswith(("/", "~")) or "\0" in path else f"{zoo}/{path}"
    before = sorted(zoo.rglob("*"))

    answers = [
        await put(http, whole, b"x"),
        await http.post("/files", files={"file": ("x", b"x")}, params={"path": whole}),
    ]

    assert [answer.status_code for answer in answers] == [status] * 2, answers[0].text
    assert sorted(zoo.rglob("*")) == before


async def test_an_unknown_user_is_a_401(http: httpx.AsyncClient, tmp_path: Path) -> None:
    read = await http.get("/files", params={"path": str(tmp_path), "username": "nobody-of-this-name"})
    written = await put(http, tmp_path / "x", b"", username="nobody-of-this-name")

    assert (read.status_code, written.status_code) == (401, 401)
    assert "error looking up user" in read.json()["message"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("query", [b"path=%ff", b"path=\xff", b"path=a%00b", b"path=%ED%A0%80", b"username=%00&path=/"])
async def test_a_query_that_is_no_text_is_refused(tmp_path: Path, query: bytes) -> None:
    """Raw bytes, which no HTTP library would send."""
    async with served(envd.create_app(Settings()), tmp_path / "http.sock"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "http.sock")
        writer.write(b"GET /files?" + query + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(30):
            answer = await reader.read()
        writer.close()

    assert answer.split()[1] in (b"400", b"401")


async def test_a_file_that_may_not_be_so_large_is_refused(http: httpx.AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        answer = await put(http, path, noise(3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert answer.status_code == 413
    assert path.read_text() == "before"
    assert unfinished(tmp_path) == []


SMALL_DISK = """
import asyncio, sys
import uvicorn
from sandbox_tools.guest import envd
from sandbox_tools.guest.main import Server
from sandbox_tools.guest.settings import Settings
app = envd.create_app(Settings())
asyncio.run(Server(uvicorn.Config(app, uds=sys.argv[1], lifespan="off", log_config=None)).serve())
"""
IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "--kill-child"]


def may_mount() -> bool:
    """Whether a file system can be mounted here, for oneself alone."""
    tried = subprocess.run([*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return tried.returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs `unshare` and user namespaces, for a disk that is small")
async def test_a_full_disk_is_a_507_and_the_old_file_stays(tmp_path: Path) -> None:
    disk, uds = tmp_path / "disk", tmp_path / "http.sock"
    disk.mkdir()
    mounted = f'mount -t tmpfs -o size=1m tmpfs {disk} && exec "$@"'
    command = [*IN_A_NAMESPACE, "sh", "-c", mounted, "-", sys.executable, "-c", SMALL_DISK, str(uds)]
    with subprocess.Popen(command) as server:
        try:
            transport = httpx.AsyncHTTPTransport(uds=str(uds))
            async with httpx.AsyncClient(transport=transport, base_url="http://guest", timeout=30) as http:
                async with asyncio.timeout(60):
                    while not uds.exists():
                        await asyncio.sleep(0.02)
                assert (await put(http, disk / "file", b"before")).status_code == 200

                answers = [
                    await put(http, disk / "file", noise(2 << 20)),
                    await http.post("/files", files={"file": (str(disk / "file"), noise(2 << 20))}),
                ]

                assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(507, 507)] * 2
                assert "disk is full" in answers[0].json()["message"]
                assert (await get(http, disk / "file")).text == "before"
                # All that had come of them is gone, so that there is room again.
                assert (await put(http, disk / "other", noise(1 << 19))).status_code == 200
        finally:
            server.kill()


async def test_a_reader_that_goes_away_is_noticed_at_once(http: httpx.AsyncClient, tmp_path: Path) -> None:
    """Else the rest of the file would be read for nobody, and nobody else be answered in the meantime."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)

    async with http.stream("GET", "/files", params={"path": str(tmp_path / "large")}) as answer:
        assert answer.status_code == 200

    async with asyncio.timeout(30):
        assert (await http.get("/health")).status_code == 204


async def test_no_file_stays_open(http: httpx.AsyncClient, tmp_path: Path) -> None:
    """Whole answers, refused ones, heads, and readers that go away in the middle."""
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 30)
    (tmp_path / "small").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        await get(http, tmp_path / "small")
        await get(http, tmp_path / "small", range="bytes=5-")
        await get(http, tmp_path)
        await http.head("/files", params={"path": str(tmp_path / "large")})
        await put(http, tmp_path / "new", b"x", headers={"content-encoding": "gzip"})
        async with http.stream("GET", "/files", params={"path": str(tmp_path / "large")}) as answer:
            assert answer.status_code == 200

    async with asyncio.timeout(30):
        while len(os.listdir("/proc/self/fd")) > before:
            await asyncio.sleep(0.01)


NAMES = st.one_of(
    st.sampled_from(["a", "..", ".", "", "~", "link", "loop", "file", "n" * 256, "\0", "\u00e4", " ", '"', "\\"]),
    st.text(max_size=6),
)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A directory that a few steps back do not lead out of the test's own."""
    root = tmp_path / "d" / "e" / "e" / "p" / "er" / "still"
    root.mkdir(parents=True)
    (root / "file").write_text("kept")
    (root / "loop").symlink_to("loop")
    (root / "link").symlink_to(root)
    return root


FUZZED = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZED
@given(names=st.lists(NAMES, max_size=6), form=st.booleans())
async def test_no_path_is_too_strange_to_be_answered(
    http: httpx.AsyncClient, deep: Path, names: list[str], form: bool
) -> None:
    """It is written where it says, or refused as the caller's fault; nothing appears beside the test's directory."""
    path = f"{deep}/{'/'.join(names)}"
    outside = deep.parents[6]
    before = sorted(outside.iterdir())

    if form:
        answer = await http.post("/files", files={"file": ("x", b"new")}, params={"path": path})
    else:
        answer = await put(http, path, b"new")

    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200:
        assert Path(answer.json()[0]["path"]).read_bytes() == b"new"
        assert answer.json()[0]["path"] == os.path.normpath(path)
    assert unfinished(outside) == []
    assert sorted(outside.iterdir()) == before
    assert (await get(http, path)).status_code in (200, 400, 404)


LINES = st.sampled_from(
    [
        b"--B",
        b"--B--",
        b"--",
        b"",
        b"B",
        b'Content-Disposition: form-data; name="file"; filename="DIR/f"',
        b'Content-Disposition: form-data; name="file"; filename="DIR/g"',
        b'Content-Disposition: form-data; name="other"',
        b"Content-Disposition: form-data; name=file",
        b'Content-Disposition: form-data; name="file"; filename="DIR/\xff"',
        b'Content-Disposition: form-data; name="file"; filename*=utf-8\'\'%2Fx%00; filename="~"',
        b'content-disposition:;;;=="',
        b"X: " + b"y" * 9000,
        b": no name",
        b"text",
    ]
)
BODIES = st.lists(LINES | st.binary(max_size=20), max_size=12).map(b"\r\n".join)


@FUZZED
@given(body=BODIES, packed=st.booleans(), step=st.integers(1, 400))
async def test_no_form_is_too_broken_to_be_answered(
    http: httpx.AsyncClient, deep: Path, body: bytes, packed: bool, step: int
) -> None:
    """What is put in its place is whole, and nothing else is left behind."""
    headers = {"content-type": "multipart/form-data; boundary=B"} | ({"content-encoding": "gzip"} if packed else {})
    body = body.replace(b"DIR", os.fsencode(deep))
    body = gzip.compress(body) if packed else body
    content = pieces(body, max(step, len(body) // 300))

    answer = await http.post("/files", content=content, headers=headers)

    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 400 or all(Path(entry["path"]).is_file() for entry in answer.json())
    assert unfinished(deep) == []
    assert {path.name for path in deep.iterdir()} <= {"file", "loop", "link", "f", "g"}


@FUZZED
@given(noise=st.binary(max_size=300), valid=st.binary(max_size=300), cut=st.integers(0, 300))
async def test_no_gzip_is_too_broken_to_be_answered(
    http: httpx.AsyncClient, deep: Path, noise: bytes, valid: bytes, cut: int
) -> None:
    body = gzip.compress(valid)[:cut] + noise

    answer = await put(http, deep / "file", body, headers={"content-encoding": "gzip"})

    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert (deep / "file").read_bytes() == gzip.decompress(body)
    assert unfinished(deep) == []


async def test_a_small_body_that_unpacks_into_a_large_file_is_written_piece_by_piece(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = b"".join(gzip.compress(bytes(1 << 20)) for _ in range(256))

    assert (await put(http, tmp_path / "zeros", packed, headers={"content-encoding": "gzip"})).status_code == 200

    assert (tmp_path / "zeros").stat().st_size == 256 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
