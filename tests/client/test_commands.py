from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox_tools.client import Client, Sandbox
from sandbox_tools.client.commands import Command
from sandbox_tools.errors import (
    APIError,
    CommandError,
    ConfigError,
    ExecutionTimeoutError,
    NotFoundError,
    SandboxExpiredError,
    SandboxStateError,
    ServerError,
    TransportError,
)
from sandbox_tools.models import Stderr, Stdout
from tests.client.loopback import ABORT, DONE, HANG, HEAD, Loopback, Step, chunk, end, envelope, nothing_left, plain
from tests.machine import PATIENCE, Box


@pytest.fixture
async def sandbox(on_engine: Client, box: Box) -> AsyncIterator[Sandbox]:
    """The same for all that leave it as they found it, which is without any process."""
    sandbox = await on_engine.connect(box.id)
    yield sandbox
    await until_nothing_runs(sandbox)


async def until_nothing_runs(sandbox: Sandbox) -> None:
    async with asyncio.timeout(PATIENCE):
        while await sandbox.commands.list():
            await asyncio.sleep(0.05)


async def test_a_command_runs_and_its_outcome_comes_back(sandbox: Sandbox) -> None:
    result = await sandbox.commands.run("echo out; echo err >&2")

    assert (0, "out\n", "err\n", None) == (result.exit_code, result.stdout, result.stderr, result.error)
    assert result is result.check()


async def test_a_command_that_fails_is_a_result_until_somebody_checks(sandbox: Sandbox) -> None:
    result = await sandbox.commands.run("echo why >&2; exit 3")

    assert (3, "exit status 3") == (result.exit_code, result.error)
    with pytest.raises(CommandError, match="why") as caught:
        result.check()
    assert result is caught.value.result


async def test_a_command_has_its_directory_variables_and_user(sandbox: Sandbox) -> None:
    result = await sandbox.commands.run("pwd; echo $GREETING; id -un", cwd="/tmp", env={"GREETING": "hé"}, user="root")

    assert "/tmp\nhé\nroot\n" == result.stdout


async def test_a_directory_that_is_not_there_is_refused_and_nothing_runs(sandbox: Sandbox) -> None:
    with pytest.raises(APIError, match="does not exist") as caught:
        await sandbox.commands.run("echo", cwd="/nowhere")

    assert "invalid_argument" == caught.value.error_code


@pytest.mark.parametrize("timeout", [0, -1])
async def test_a_timeout_that_cannot_be_is_refused(sandbox: Sandbox, timeout: float) -> None:
    with pytest.raises(ConfigError):
        await sandbox.commands.run("echo", timeout=timeout)


async def test_a_character_that_comes_in_two_pieces_is_one(sandbox: Sandbox) -> None:
    """The second half is written only after the first has been seen to arrive."""
    seen: list[str] = []
    async with await sandbox.commands.start("printf 'a\\xe2\\x82'; read; printf '\\xac'", stdin=True) as command:
        async for piece in command:
            seen.append(piece.text)
            if seen == ["a"]:
                await command.send_stdin("\n")
        assert "a€" == (await command.wait()).stdout
    assert ["a", "€"] == seen


async def test_bytes_that_are_no_text_are_replaced_also_at_the_end(sandbox: Sandbox) -> None:
    assert "a\ufffdb\ufffd" == (await sandbox.commands.run("printf 'a\\xffb\\xe2'")).stdout


async def test_callbacks_hear_of_output_as_it_arrives(sandbox: Sandbox) -> None:
    out: list[str] = []
    err: list[str] = []
    await sandbox.commands.run("echo a; echo b >&2", on_stdout=out.append, on_stderr=err.append)

    assert ("a\n", "b\n") == ("".join(out), "".join(err))


async def test_output_without_end_leaves_both_its_ends_and_memory_flat(sandbox: Sandbox) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    result = await sandbox.commands.run("echo begun; head -c 50000000 /dev/zero | tr '\\0' x; echo; echo done")

    assert result.stdout.startswith("begun\n")
    assert result.stdout.endswith("x\ndone\n")
    assert result.stdout_omitted > 49_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10


async def test_a_command_past_its_timeout_is_killed_and_leaves_what_it_had_said(sandbox: Sandbox) -> None:
    async with nothing_left(sandbox):
        with pytest.raises(ExecutionTimeoutError) as caught:
            await sandbox.commands.run("echo begun; sleep 1000", timeout=1)

    assert caught.value.partial is not None
    assert "begun\n" == caught.value.partial.stdout
    await until_nothing_runs(sandbox)


@pytest.mark.parametrize("way", ["cancelled", "callback raises"])
async def test_a_foreground_command_that_nobody_waits_for_is_killed(sandbox: Sandbox, way: str) -> None:
    begun = asyncio.Event()

    def on_stdout(text: str) -> None:
        begun.set()
        if way == "callback raises":
            raise ZeroDivisionError

    async with nothing_left(sandbox):
        task = asyncio.create_task(sandbox.commands.run("echo begun; sleep 1000", timeout=None, on_stdout=on_stdout))
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)

    assert isinstance(outcome, (asyncio.CancelledError, ZeroDivisionError))
    await until_nothing_runs(sandbox)


async def test_a_background_command_outlives_its_disconnect_and_is_found_by_its_id(sandbox: Sandbox) -> None:
    async with nothing_left(sandbox):
        command = await sandbox.commands.start(
            "read; echo $REPLY; sleep 1000", stdin=True, timeout=None, env={"SECRET": "s3cret"}
        )
        await command.disconnect()
        with pytest.raises(TransportError, match="connect"):
            await command.wait()

        (info,) = await sandbox.commands.list()
        assert (command.pid, "/bin/bash") == (info.pid, info.cmd)
        assert ["-l", "-c"] == info.args[:2]
        assert "s3cret" == info.env["SECRET"]
        assert "s3cret" not in repr(info)

        async with await sandbox.commands.connect(command.pid) as again:
            await again.send_stdin("heard\n")
            assert Stdout(text="heard\n") == await anext(again)
            assert await again.kill()
            result = await again.wait()
        assert (-1, "signal: killed", "heard\n") == (result.exit_code, result.error, result.stdout)
        assert not await sandbox.commands.kill(command.pid)


async def test_output_can_be_iterated_and_the_result_still_has_all_of_it(sandbox: Sandbox) -> None:
    async with await sandbox.commands.start("echo a; echo b >&2; exit 1") as command:
        pieces = [piece async for piece in command]
        result = await command.wait()

    assert {"a\n", "b\n"} == {piece.text for piece in pieces}
    assert {Stdout, Stderr} == {type(piece) for piece in pieces}
    assert (1, "a\n", "b\n") == (result.exit_code, result.stdout, result.stderr)
    assert result == await command.wait()


async def test_input_arrives_whole_and_ends_where_it_is_closed(sandbox: Sandbox) -> None:
    """More than one message of it, and more than any pipe holds."""
    async with await sandbox.commands.start("sha256sum; wc -c <<< rest", stdin=True) as command:
        for piece in (b"\x00\xff" * 1_500_000, "é"):
            await command.send_stdin(piece)
        await command.close_stdin()
        result = await command.wait()

    digest = hashlib.sha256(b"\x00\xff" * 1_500_000 + "é".encode()).hexdigest()
    assert digest == result.stdout.split()[0]


async def test_a_command_without_input_says_so_and_one_that_has_ended_is_not_found(sandbox: Sandbox) -> None:
    async with await sandbox.commands.start("sleep 1000") as command:
        with pytest.raises(ServerError, match="stdin not enabled"):
            await command.send_stdin("x")
        await command.kill()
        await command.wait()
        with pytest.raises(NotFoundError):
            await command.send_stdin("x")
    with pytest.raises(NotFoundError):
        await sandbox.commands.connect(99_999)


async def test_a_background_command_survives_a_pause_and_its_handle_says_why_it_broke(on_engine: Client) -> None:
    sandbox = await on_engine.create("base")
    try:
        command = await sandbox.commands.start("read; echo $REPLY", stdin=True, timeout=None)
        await sandbox.pause()
        with pytest.raises(SandboxStateError) as caught:
            await command.wait()
        assert not isinstance(caught.value, SandboxExpiredError)
        with pytest.raises(SandboxStateError):
            await sandbox.commands.run("echo")

        await sandbox.resume()
        async with await sandbox.commands.connect(command.pid) as again:
            await again.send_stdin("awake\n")
            assert "awake\n" == (await again.wait()).stdout
    finally:
        await sandbox.kill()


async def test_a_command_whose_sandbox_is_killed_says_that_it_is_gone(on_engine: Client) -> None:
    sandbox = await on_engine.create("base")
    command = await sandbox.commands.start("sleep 1000")
    await sandbox.kill()

    async with nothing_left(sandbox):
        with pytest.raises(SandboxExpiredError):
            await command.wait()
        with pytest.raises(SandboxExpiredError):
            await sandbox.commands.run("echo")


START, SIGNAL = "/process.Process/Start", "/process.Process/SendSignal"


def event(**event: Any) -> bytes:
    return envelope({"event": event})


def said(text: bytes, stream: str = "stdout") -> bytes:
    return event(data={stream: base64.b64encode(text).decode()})


BEGUN = event(start={"pid": 7})


async def test_the_timeout_holds_where_the_server_does_not_keep_it(both: tuple[Loopback, Sandbox]) -> None:
    """The SDKs wait for ever here (PROTOCOL.md, 4.3); the command is ended as well."""
    loopback, sandbox = both
    loopback.on(START, [HEAD, chunk(BEGUN, said(b"begun"), event(keepalive={})), HANG])
    loopback.on(SIGNAL, [plain({})])

    async with nothing_left(sandbox):
        with pytest.raises(ExecutionTimeoutError) as caught:
            await sandbox.commands.run("sleep 1000", timeout=0.1)

    assert caught.value.partial is not None
    assert "begun" == caught.value.partial.stdout
    (signal,) = loopback.sent(SIGNAL)
    assert b'"pid": 7' in signal.body


async def test_the_servers_own_word_for_a_timeout_is_the_same_error(both: tuple[Loopback, Sandbox]) -> None:
    loopback, sandbox = both
    loopback.on(START, [HEAD, chunk(BEGUN, said(b"begun"), end("deadline_exceeded")), DONE])
    loopback.on(SIGNAL, [plain({"code": "not_found", "message": "no such process"}, 404)])

    with pytest.raises(ExecutionTimeoutError, match="60 s") as caught:
        await sandbox.commands.run("sleep 1000")
    assert caught.value.partial is not None
    assert "begun" == caught.value.partial.stdout


@pytest.mark.parametrize(
    "steps", [[ABORT], [HEAD, ABORT], [HEAD, chunk(BEGUN), ABORT], [HEAD, chunk(BEGUN, said(b"a")), DONE]], ids=len
)
async def test_a_command_whose_connection_breaks_is_not_sent_again_nor_ended(
    both: tuple[Loopback, Sandbox], steps: list[Step]
) -> None:
    loopback, sandbox = both
    loopback.on(START, steps)

    async with nothing_left(sandbox):
        with pytest.raises(TransportError) as caught:
            await sandbox.commands.run("rm -rf build && make")
    assert not caught.value.retryable
    assert (1, 0) == (len(loopback.sent(START)), len(loopback.sent(SIGNAL)))


@pytest.mark.parametrize(
    "steps",
    [
        [HEAD, chunk(end()), DONE],
        [HEAD, chunk(said(b"a"), BEGUN, end()), DONE],
        [HEAD, chunk(event(start={}), end()), DONE],
        [HEAD, chunk(event(start={"pid": "x"}), end()), DONE],
        [HEAD, chunk(envelope({"event": 1}), end()), DONE],
        [HEAD, chunk(BEGUN, envelope({"event": 1}), end()), DONE],
        [HEAD, chunk(BEGUN, event(data={"stdout": "?"}), end()), DONE],
        [HEAD, chunk(BEGUN, event(end=3), end()), DONE],
        [HEAD, chunk(BEGUN, event(end={"exitCode": "x"}), end()), DONE],
        [HEAD, chunk(BEGUN, end()), DONE],
        [plain(b"<html>welcome")],
    ],
    ids=str,
)
async def test_an_answer_that_tells_of_no_process_or_no_end_is_never_a_result(
    both: tuple[Loopback, Sandbox], steps: list[Step]
) -> None:
    loopback, sandbox = both
    loopback.on(START, steps)
    loopback.on(SIGNAL, [plain({})])

    async with nothing_left(sandbox):
        with pytest.raises(TransportError):
            await sandbox.commands.run("echo")


async def test_a_result_may_leave_out_what_is_nought(both: tuple[Loopback, Sandbox]) -> None:
    """As the JSON of protocol buffers does."""
    loopback, sandbox = both
    loopback.on(START, [HEAD, chunk(BEGUN, said(b"a"), event(end={"exited": True, "status": "exit status 0"}), end())])

    result = await sandbox.commands.run("echo -n a")
    assert (0, "a", None) == (result.exit_code, result.stdout, result.error)


@pytest.mark.parametrize("steps", [[HANG], [HEAD, HANG], [HEAD, chunk(BEGUN), HANG]], ids=len)
async def test_a_start_that_is_cancelled_leaves_nothing_here(both: tuple[Loopback, Sandbox], steps: list[Step]) -> None:
    """What has started, or may have, is killed, and its killing does not hold the caller up for long."""
    loopback, sandbox = both
    loopback.on(START, steps)
    loopback.on(SIGNAL, [plain({})])

    async with nothing_left(sandbox):
        task = asyncio.create_task(sandbox.commands.run("sleep 1000", timeout=None))
        async with asyncio.timeout(PATIENCE):
            await loopback.hanging.wait()
        if len(steps) == 3:
            await asyncio.wait({task}, timeout=0.2)  # for it to have read the id
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(PATIENCE):
            await loopback.left.wait()
    ((start,), (signal,)) = loopback.sent(START), loopback.sent(SIGNAL)
    process = {"pid": 7} if len(steps) == 3 else {"tag": json.loads(start.body[5:])["tag"]}
    assert {"process": process, "signal": "SIGNAL_SIGKILL"} == json.loads(signal.body)


async def test_a_start_that_was_cancelled_and_arrives_late_is_looked_for_again(
    both: tuple[Loopback, Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback, sandbox = both
    none = plain({"code": "not_found", "message": "no such process"}, 404)
    loopback.on(START, [HANG])
    loopback.on(SIGNAL, [none], [plain({})], [none])
    monkeypatch.setattr("sandbox_tools.client.commands.STARTING", (0.0, 0.0, 0.0))

    task = asyncio.create_task(sandbox.commands.run("sleep 1000", timeout=None))
    async with asyncio.timeout(PATIENCE):
        await loopback.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 2 == len(loopback.sent(SIGNAL))


async def test_whenever_a_command_without_a_limit_is_cancelled_nothing_of_it_runs_on(sandbox: Sandbox) -> None:
    for moment in range(12):
        task = asyncio.create_task(sandbox.commands.run("sleep 1000", timeout=None))
        await asyncio.wait({task}, timeout=0.004 * moment)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until_nothing_runs(sandbox)


async def test_a_kill_that_hangs_does_not_keep_a_cancelled_caller(
    both: tuple[Loopback, Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback, sandbox = both
    loopback.on(START, [HEAD, chunk(BEGUN, said(b"begun")), HANG])
    loopback.on(SIGNAL, [HANG])
    monkeypatch.setattr("sandbox_tools.client.commands.END_TIMEOUT", 0.1)
    begun = asyncio.Event()

    async with nothing_left(sandbox), asyncio.timeout(PATIENCE):
        task = asyncio.create_task(sandbox.commands.run("sleep 1000", timeout=None, on_stdout=lambda text: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_leaving_a_command_disconnects_it(both: tuple[Loopback, Sandbox]) -> None:
    loopback, sandbox = both
    loopback.on(START, [HEAD, chunk(BEGUN), HANG])

    async with nothing_left(sandbox):
        async with await sandbox.commands.start("sleep 1000") as command:
            assert isinstance(command, Command)
        async with asyncio.timeout(PATIENCE):
            await loopback.left.wait()
    assert not loopback.sent(SIGNAL)


async def test_commands_look_as_the_vendors_sdks_send_them(both: tuple[Loopback, Sandbox]) -> None:
    """PROTOCOL.md, appendix A."""
    loopback, sandbox = both
    loopback.on(START, [HEAD, chunk(BEGUN, event(end={}), end()), DONE])

    await sandbox.commands.run("echo hi", env={"B": "2"}, cwd="/tmp")
    (request,) = loopback.sent(START)
    message = json.loads(request.body[5:])
    assert message.pop("tag")
    assert {
        "process": {"cmd": "/bin/bash", "args": ["-l", "-c", "echo hi"], "envs": {"B": "2"}, "cwd": "/tmp"},
        "stdin": False,
    } == message
    assert "60000" == request.headers["connect-timeout-ms"]

    with contextlib.suppress(TransportError):
        await sandbox.commands.run("echo hi", timeout=None)
    assert "connect-timeout-ms" not in loopback.sent(START)[1].headers
