from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.errors import (
    ConflictError,
    ExecutionTimeoutError,
    NotFoundError,
    SandboxExpiredError,
    SandboxStateError,
)
from sandbox_tools.models import ExecutionEvent, Stdout
from tests.conftest import own_state
from tests.machine import PATIENCE


@pytest.fixture
async def sandbox(on_engine: Client) -> AsyncIterator[Sandbox]:
    sandbox = await on_engine.create(metadata={"k 1": "v&=/é"}, env={"GREETING": "hello"})
    yield sandbox
    await sandbox.kill()


async def test_variables_survive_a_pause_and_another_client_finds_them(sandbox: Sandbox, on_engine: Client) -> None:
    await sandbox.run_code("import os; x = 41")
    assert await sandbox.pause()
    assert not await sandbox.pause()
    info = await sandbox.info()
    assert ("paused", 0) == (info.state, info.resident_bytes)

    async with Client(provider="local", state_dir=on_engine.transport._engine.state) as other:  # type: ignore[union-attr]
        again = await other.connect(sandbox.id)
        execution = await again.run_code("print(os.environ['GREETING']); x + 1")
    assert ("hello\n", "42") == (execution.stdout, execution.text)


async def test_a_frozen_sandbox_is_used_as_if_it_ran(sandbox: Sandbox, on_engine: Client) -> None:
    await sandbox.run_code("x = 41")
    assert await sandbox.freeze()
    assert await on_engine.freeze(sandbox.id)
    info = await sandbox.info()
    assert "running" == info.state
    assert info.frozen_since is not None
    assert info.spent is not None

    assert "42" == (await sandbox.run_code("x + 1")).text
    assert (await sandbox.info()).frozen_since is None
    assert (await sandbox.info()).spent.frozen > 0  # type: ignore[union-attr]


async def test_what_cannot_be_frozen_says_why(sandbox: Sandbox, on_engine: Client) -> None:
    async with asyncio.timeout(PATIENCE), contextlib.aclosing(sandbox.stream_code("while True: print(1)")) as events:
        await anext(events)
        with pytest.raises(ConflictError, match="in use"):
            await sandbox.freeze()
    await sandbox.pause()
    assert not await sandbox.freeze()
    with pytest.raises(NotFoundError):
        await on_engine.freeze("nobody")


async def test_a_pause_of_a_frozen_sandbox_leaves_its_mark_and_its_resume_finds_it(sandbox: Sandbox) -> None:
    await sandbox.run_code("x = 41")
    await sandbox.freeze()
    assert await sandbox.pause()
    assert sandbox.sentinel is not None
    await sandbox.resume()
    assert "41" == (await sandbox.run_code("x")).text


async def test_a_listing_finds_a_sandbox_by_its_metadata(sandbox: Sandbox, on_engine: Client) -> None:
    assert [sandbox.id] == [info.sandbox_id async for info in on_engine.list(metadata={"k 1": "v&=/é"})]
    assert sandbox.id not in [info.sandbox_id async for info in on_engine.list(state="paused")]


async def test_code_past_its_timeout_is_interrupted_and_its_variables_are_kept(sandbox: Sandbox) -> None:
    await sandbox.run_code("x = 1")

    with pytest.raises(ExecutionTimeoutError) as caught:
        await sandbox.run_code("print('begun', flush=True)\nwhile True: pass", timeout=2)
    assert caught.value.partial is not None
    assert "begun\n" == caught.value.partial.stdout
    assert "1" == (await sandbox.run_code("x", timeout=PATIENCE)).text


async def test_code_of_a_cancelled_call_is_interrupted(sandbox: Sandbox) -> None:
    begun = asyncio.Event()

    def on_event(event: ExecutionEvent) -> None:
        if isinstance(event, Stdout):
            begun.set()

    task = asyncio.create_task(
        sandbox.run_code("print('begun', flush=True)\nwhile True: pass", timeout=None, on_event=on_event)
    )
    async with asyncio.timeout(PATIENCE):
        await begun.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    assert "2" == (await sandbox.run_code("1 + 1", timeout=PATIENCE)).text


async def test_code_that_is_running_when_its_sandbox_goes_says_which_way_it_went(on_engine: Client) -> None:
    for verb, error in (("pause", SandboxStateError), ("kill", SandboxExpiredError)):
        sandbox = await on_engine.create()
        async with contextlib.aclosing(sandbox.stream_code("while True: pass", timeout=PATIENCE)) as events:
            await anext(events)
            await getattr(sandbox, verb)()
            with pytest.raises(SandboxStateError) as caught:
                async for _ in events:
                    pass
        assert error is type(caught.value)
        await sandbox.kill()


async def test_what_is_not_awake_or_not_there_says_so(sandbox: Sandbox, on_engine: Client) -> None:
    await sandbox.pause()
    with pytest.raises(SandboxStateError):
        await sandbox.run_code("1")
    with pytest.raises(SandboxStateError):
        await sandbox.set_timeout(60)
    assert await sandbox.kill()
    with pytest.raises(SandboxExpiredError):
        await sandbox.run_code("1")
    with pytest.raises(NotFoundError):
        await on_engine.connect(sandbox.id)
    with pytest.raises(NotFoundError):
        await on_engine.info("nobody")


async def test_a_large_display_leaves_only_its_size_and_memory_stays_flat(sandbox: Sandbox) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    code = "from IPython.display import HTML, display\ndisplay(HTML('x' * 50_000_000))\nprint('y' * 50_000_000)"
    execution = await sandbox.run_code(code)

    assert [None] == [result.html for result in execution.results]
    assert execution.results[0].omitted_bytes > 49_000_000
    assert execution.stdout_omitted > 49_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10


@pytest.fixture
def state(templates: Path) -> Iterator[Path]:
    """A state directory without an engine; those that clients start on it are ended."""
    with own_state() as state:
        yield state
        for pid in engines(state):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while engines(state) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [] == engines(state)


def engines(state: Path) -> list[int]:
    """The processes that serve a state directory."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            argv = cmdline.read_text(errors="replace").split("\0")
            if "serve" in argv and str(state) in argv:
                found.append(int(cmdline.parent.name))

    return found


async def test_clients_start_one_engine_between_them_and_a_new_one_when_it_is_gone(state: Path) -> None:
    """What is paused does not need the engine that paused it."""
    async with Client(provider="local", state_dir=state) as first, Client(provider="local", state_dir=state) as second:
        sandboxes = await asyncio.gather(first.create(), second.create())
        (pid,) = engines(state)
        await sandboxes[0].run_code("x = 41")
        await sandboxes[0].pause()
        await sandboxes[1].kill()
        os.kill(pid, signal.SIGKILL)

        await sandboxes[0].resume()
        assert "42" == (await sandboxes[0].run_code("x + 1")).text
        assert [pid] != engines(state)
        await sandboxes[0].kill()
