from __future__ import annotations

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.errors import (
    APIError,
    ConfigError,
    NotFoundError,
    ProtocolError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    ServerError,
    TransportError,
)
from tests.client.loopback import ABORT, DONE, HANG, Loopback, Step, chunk, nothing_left, plain
from tests.machine import PATIENCE, Box


@pytest.fixture
async def sandbox(on_engine: Client, box: Box) -> Sandbox:
    """The same for all, each time with an empty `~/t`."""
    sandbox = await on_engine.connect(box.id)
    await sandbox.files.remove("t")
    await sandbox.files.make_dir("t")
    return sandbox


@pytest.mark.parametrize("data", [b"", b"\x00\xff\r\n", "hé€\n", b"x" * 3_000_000], ids=len)
async def test_what_is_written_is_read(sandbox: Sandbox, data: bytes | str) -> None:
    written = await sandbox.files.write("t/deep/er/file", data)

    assert ("/home/user/t/deep/er/file", "file", "file") == (written.path, written.name, written.type)
    assert (data.encode() if isinstance(data, str) else data) == await sandbox.files.read("t/deep/er/file")


@pytest.mark.parametrize("name", ["a b", "q?x=1&y=2#z", "100%25", "hé€", "a+b", '"quoted"'])
async def test_any_name_is_the_same_everywhere(sandbox: Sandbox, name: str) -> None:
    await sandbox.files.write(f"t/{name}", name)

    assert name == (await sandbox.files.read(f"t/{name}")).decode()
    assert [name] == [entry.name for entry in await sandbox.files.list("t")]
    assert await sandbox.files.exists(f"t/{name}")


async def test_a_large_file_goes_both_ways_without_being_held_in_memory(sandbox: Sandbox) -> None:
    piece = bytes(range(256)) * 1024
    count = 200

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    await sandbox.files.write("t/large", pieces())
    sent, found, size = hashlib.sha256(), hashlib.sha256(), 0
    async for each in pieces():
        sent.update(each)
    async with aclosing(sandbox.files.stream("t/large")) as chunks:
        async for each in chunks:
            found.update(each)
            size += len(each)

    assert count * len(piece) == size == (await sandbox.files.info("t/large")).size
    assert sent.digest() == found.digest()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10


async def test_a_listing_goes_as_deep_as_it_is_told(sandbox: Sandbox) -> None:
    await sandbox.files.write("t/a/b/c", "1234")
    await sandbox.commands.run("ln -s /nowhere t/z")

    assert ["a", "z"] == [entry.name for entry in await sandbox.files.list("t")]
    a, b, c, z = await sandbox.files.list("t", depth=3)
    assert ("directory", "directory", "file", "unspecified") == (a.type, b.type, c.type, z.type)
    assert ("/home/user/t/a/b/c", 4, "-rw-r--r--", "user") == (c.path, c.size, c.permissions, c.owner)
    assert c.modified_time is not None
    assert "/nowhere" == z.symlink_target
    with pytest.raises(ConfigError):
        await sandbox.files.list("t", depth=0)


async def test_directories_are_made_files_moved_and_all_is_removed(sandbox: Sandbox) -> None:
    assert await sandbox.files.make_dir("t/one/two")
    assert not await sandbox.files.make_dir("t/one/two")

    await sandbox.files.write("t/from", "x")
    moved = await sandbox.files.move("t/from", "t/new/to")
    assert ("/home/user/t/new/to", 1) == (moved.path, moved.size)
    assert not await sandbox.files.exists("t/from")

    for _ in range(2):
        await sandbox.files.remove("t/new")
    assert not await sandbox.files.exists("t/new/to")


async def test_a_file_belongs_to_whoever_writes_it(sandbox: Sandbox) -> None:
    await sandbox.files.write("/tmp/of-root", "x", user="root")

    assert "root" == (await sandbox.files.info("/tmp/of-root")).owner
    await sandbox.files.remove("/tmp/of-root", user="root")


async def test_what_is_not_there_is_not_found_though_the_sandbox_is(sandbox: Sandbox) -> None:
    for look in (
        sandbox.files.read("t/none"),
        sandbox.files.list("t/none"),
        sandbox.files.info("t/none"),
        sandbox.files.move("t/none", "t/x"),
    ):
        with pytest.raises(NotFoundError, match="none' does not exist") as caught:
            await look
        assert "which itself is there" in str(caught.value)
    assert not await sandbox.files.exists("t/none")


async def test_what_is_of_another_kind_is_refused_in_words(sandbox: Sandbox) -> None:
    await sandbox.files.write("t/file", "x")
    for look in (
        sandbox.files.read("t"),
        sandbox.files.write("t", b"x"),
        sandbox.files.write("t", b"x" * 5_000_000),
        sandbox.files.list("t/file"),
        sandbox.files.make_dir("t/file"),
        sandbox.files.read("t/file", user="nobody-of-that-name"),
    ):
        with pytest.raises(APIError) as caught:
            await look
        assert not isinstance(caught.value, (NotFoundError, ServerError))


@pytest.mark.parametrize("error", [ZeroDivisionError(), httpx.ReadError("elsewhere"), httpx.ConnectError("elsewhere")])
async def test_a_source_that_fails_leaves_the_old_file_and_its_own_error(sandbox: Sandbox, error: Exception) -> None:
    """Also where that is a download of the caller's own, whose failure is none of this request."""
    await sandbox.files.write("t/file", "old")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"new"
        raise error

    async with nothing_left(sandbox):
        with pytest.raises(type(error)) as caught:
            await sandbox.files.write("t/file", pieces())

    assert error is caught.value
    assert b"old" == await sandbox.files.read("t/file")


async def test_a_write_that_is_cancelled_leaves_the_old_file_and_nothing_beside_it(sandbox: Sandbox) -> None:
    await sandbox.files.write("t/file", "old")
    begun = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"new" * 100_000
        begun.set()
        await asyncio.Event().wait()

    async with nothing_left(sandbox):
        task = asyncio.create_task(sandbox.files.write("t/file", pieces()))
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert b"old" == await sandbox.files.read("t/file")
    async with asyncio.timeout(PATIENCE):
        while [entry.name for entry in await sandbox.files.list("t")] != ["file"]:
            await asyncio.sleep(0.02)


async def test_a_reader_that_leaves_closes_its_connection(sandbox: Sandbox) -> None:
    await sandbox.files.write("t/file", b"x" * 5_000_000)
    async with nothing_left(sandbox):
        async with aclosing(sandbox.files.stream("t/file")) as chunks:
            assert await anext(chunks)


async def test_files_of_a_sandbox_that_sleeps_or_is_gone_say_so(on_engine: Client) -> None:
    sandbox = await on_engine.create("base")
    try:
        await sandbox.files.write("file", "kept")
        await sandbox.pause()
        for look in (sandbox.files.read("file"), sandbox.files.write("file", "x"), sandbox.files.exists("file")):
            with pytest.raises(SandboxStateError) as caught:
                await look
            assert not isinstance(caught.value, SandboxExpiredError)
        await sandbox.resume()
        assert b"kept" == await sandbox.files.read("file")
    finally:
        await sandbox.kill()
    for look in (sandbox.files.read("file"), sandbox.files.write("file", "x"), sandbox.files.exists("file")):
        with pytest.raises(SandboxExpiredError):
            await look


FILES = "/files"
WRITTEN = plain([{"path": "/f", "name": "f", "type": "file"}])


async def test_files_look_as_the_vendors_sdks_send_them(both: tuple[Loopback, Sandbox]) -> None:
    """PROTOCOL.md, 4.1: the body as it is, with its length where that is known."""
    loopback, sandbox = both
    loopback.on(FILES, [WRITTEN])

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    await sandbox.files.write("a b", "é")
    await sandbox.files.write("/f", pieces(), user="root")
    known, unknown = loopback.sent(FILES)
    assert ("POST", "/files?path=a%20b", "é".encode()) == (known.method, known.target.replace("+", "%20"), known.body)
    assert ("application/octet-stream", "2") == (known.headers["content-type"], known.headers["content-length"])
    assert "/files?path=%2Ff&username=root" == unknown.target
    assert ("chunked", b"ab") == (unknown.headers["transfer-encoding"], unknown.body)
    assert "token-of-i1" == known.headers["x-access-token"]


async def test_a_read_is_sent_again_where_nothing_came_and_a_write_never(both: tuple[Loopback, Sandbox]) -> None:
    loopback, sandbox = both
    loopback.on(FILES, [ABORT], [plain(b"content")])
    assert b"content" == await sandbox.files.read("f")
    assert 2 == len(loopback.sent(FILES))

    loopback.requests.clear()
    loopback.on(FILES, [ABORT], [WRITTEN])
    with pytest.raises(TransportError) as caught:
        await sandbox.files.write("f", "x")
    assert caught.value.retryable is None
    assert 1 == len(loopback.sent(FILES))


PARTS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "steps",
    [
        [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", ABORT],
        [PARTS, chunk(b"half"), ABORT],
    ],
    ids=["known length", "pieces"],
)
async def test_half_a_file_is_never_a_whole_one(both: tuple[Loopback, Sandbox], steps: list[Step]) -> None:
    loopback, sandbox = both
    loopback.on(FILES, steps)

    async with nothing_left(sandbox):
        with pytest.raises(TransportError):
            await sandbox.files.read("f")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (plain({"code": 404, "message": "path '/f' does not exist"}, 404), NotFoundError),
        (plain({"code": 404, "message": "sandbox i1 not found"}, 404), ProtocolError),
        (plain(b"<html>not found", 404), ProtocolError),
        (plain({"code": 507, "message": "path '/f': the disk is full"}, 507), ServerError),
        (plain([]), ProtocolError),
        (plain([{"name": "f"}]), ProtocolError),
        (plain(b"<html>welcome"), ProtocolError),
    ],
    ids=str,
)
async def test_what_answers_a_write_is_told_apart(
    both: tuple[Loopback, Sandbox], answer: bytes, error: type[SandboxError]
) -> None:
    loopback, sandbox = both
    loopback.on(FILES, [answer])

    with pytest.raises(SandboxError) as caught:
        await sandbox.files.write("f", "x")
    assert error is type(caught.value)


@pytest.mark.parametrize("steps", [[HANG], [PARTS, HANG], [PARTS, chunk(b"half"), HANG]], ids=len)
@pytest.mark.parametrize("verb", ["read", "write"])
async def test_a_cancelled_transfer_leaves_no_connection_and_no_task(
    both: tuple[Loopback, Sandbox], steps: list[Step], verb: str
) -> None:
    loopback, sandbox = both
    loopback.on(FILES, [*steps, DONE])
    async with nothing_left(sandbox):
        task = asyncio.create_task(sandbox.files.read("f") if verb == "read" else sandbox.files.write("f", "x"))  # type: ignore[arg-type]
        async with asyncio.timeout(PATIENCE):
            await loopback.hanging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(PATIENCE):
            await loopback.left.wait()
