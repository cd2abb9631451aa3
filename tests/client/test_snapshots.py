from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.errors import ConflictError, NotFoundError


@pytest.fixture
async def sandbox(on_engine: Client) -> AsyncIterator[Sandbox]:
    sandbox = await on_engine.create(metadata={"of": "original"})
    yield sandbox
    await sandbox.kill()


async def test_a_snapshot_is_a_template_that_outlives_its_sandbox(on_engine: Client) -> None:
    original = await on_engine.create()
    try:
        await original.run_code("x = 41")
        first = await on_engine.snapshot(original.id)
        named = await on_engine.snapshot(original.id, name="mine")
        await original.run_code("x = 0")
        assert {first.snapshot_id, named.snapshot_id} == {
            info.snapshot_id async for info in on_engine.list_snapshots(sandbox_id=original.id)
        }
        assert ["mine:default"] == named.names
        assert named.size_bytes
    finally:
        await original.kill()

    made = []
    try:
        for template in (first.snapshot_id, "mine"):
            made.append(await on_engine.create(template))
            assert "42" == (await made[-1].run_code("x + 1")).text
        listed = [info.sandbox_id async for info in on_engine.list(template=first.snapshot_id.removesuffix(":default"))]
        assert [made[0].id] == listed
    finally:
        for sandbox in made:
            await sandbox.kill()
        assert await on_engine.delete_snapshot(first.snapshot_id)
        assert await on_engine.delete_snapshot("mine")
    assert not await on_engine.delete_snapshot(first.snapshot_id)
    assert [] == [info async for info in on_engine.list_snapshots(sandbox_id=original.id)]


async def test_forks_have_the_memory_of_their_original_and_then_their_own(on_engine: Client, sandbox: Sandbox) -> None:
    await sandbox.run_code("x = 41")
    copies = await on_engine.fork(sandbox.id, count=2, timeout=60)
    try:
        assert 2 == len({copy.id for copy in copies if isinstance(copy, Sandbox)} - {sandbox.id})
        for number, copy in enumerate(copies):
            assert isinstance(copy, Sandbox)
            assert str(41 + number) == (await copy.run_code(f"x += {number}; x")).text
            assert "original" == (await copy.info()).metadata["of"]
        assert "41" == (await sandbox.run_code("x")).text
    finally:
        for copy in copies:
            if isinstance(copy, Sandbox):
                await copy.kill()


async def test_metrics_say_what_a_sandbox_takes_in_bytes(on_engine: Client, sandbox: Sandbox) -> None:
    (sample, *_) = await on_engine.metrics(sandbox.id)
    info = await sandbox.info()

    assert sample.mem_total == info.memory_mb << 20
    assert sample.mem_used
    assert abs(sample.timestamp - datetime.now(UTC)) < timedelta(minutes=10)
    assert [] == await on_engine.metrics(sandbox.id, end=datetime.now(UTC) - timedelta(hours=1))
    assert await on_engine.metrics(sandbox.id, start=datetime.now(UTC) - timedelta(hours=1))


async def test_a_pause_without_memory_keeps_only_files(sandbox: Sandbox, on_engine: Client) -> None:
    await sandbox.run_code("x = 41\nwith open('kept.txt', 'w') as file: file.write('kept')")

    assert await on_engine.pause(sandbox.id, memory=False)
    assert not await on_engine.pause(sandbox.id, memory=False)
    await sandbox.resume()
    assert "('kept', False)" == (await sandbox.run_code("open('kept.txt').read(), 'x' in globals()")).text


async def test_what_cannot_be_copied_says_why(on_engine: Client, sandbox: Sandbox) -> None:
    await sandbox.pause()
    for call in (on_engine.fork, on_engine.snapshot):
        with pytest.raises(ConflictError):
            await call(sandbox.id)
        with pytest.raises(NotFoundError):
            await call("nobody")
    with pytest.raises(NotFoundError):
        await on_engine.metrics("nobody")
