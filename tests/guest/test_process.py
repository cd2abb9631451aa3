"""What the process service promises: output whole and in order, ends told as Go does, and nobody blocked by nobody."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from sandbox_tools.guest import envd, processes
from sandbox_tools.guest.accounts import account
from sandbox_tools.guest.envelopes import envelope
from sandbox_tools.guest.processes import Processes
from sandbox_tools.guest.settings import Settings
from tests.guest.conftest import served
from tests.rpc import STREAM, Envelopes, Followed, bash, basic

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE = 60


class Caller:
    """Calls the service of one guest."""

    def __init__(self, http: httpx.AsyncClient, settings: Settings, processes: Processes) -> None:
        self.http = http
        self.settings = settings
        self.processes = processes

    @contextlib.asynccontextmanager
    async def stream(self, method: str, message: Any, **headers: str) -> AsyncIterator[Stream]:
        """A stream as it comes; leaving early closes the connection."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            asyncio.timeout(PATIENCE),
            self.http.stream(
                "POST", f"/process.Process/{method}", content=envelope(message), headers={**STREAM, **more}
            ) as answer,
        ):
            assert answer.status_code == 200
            yield Stream(answer)

    async def start(self, message: Any, **headers: str) -> Followed:
        """A process from its beginning to its end."""
        async with self.stream("Start", message, **headers) as stream:
            return await stream.rest()

    async def connect(self, pid: int) -> Followed:
        """A process from now to its end."""
        async with self.stream("Connect", {"process": {"pid": pid}}) as stream:
            return await stream.rest()

    async def call(self, method: str, message: Any) -> tuple[int, Any]:
        """Status and answer of a unary call."""
        answer = await self.http.post(f"/process.Process/{method}", json=message, timeout=PATIENCE)
        return answer.status_code, answer.json()

    async def type(self, pid: int, text: str, kind: str = "stdin") -> tuple[int, Any]:
        """Input."""
        data = base64.b64encode(text.encode()).decode()
        return await self.call("SendInput", {"process": {"pid": pid}, "input": {kind: data}})

    async def kill(self, pid: int, name: str = "SIGNAL_SIGKILL") -> tuple[int, Any]:
        """A signal."""
        return await self.call("SendSignal", {"process": {"pid": pid}, "signal": name})


class Stream:
    """The events of a process as they come."""

    def __init__(self, answer: httpx.Response) -> None:
        self._bytes = answer.aiter_bytes()
        self._envelopes = Envelopes()
        self.seen = Followed()

    async def until(self, enough: Callable[[Followed], object]) -> Followed:
        """What was seen once it is enough."""
        while not enough(self.seen):
            try:
                self.seen.take(self._envelopes.feed(await anext(self._bytes)))
            except (httpx.ReadTimeout, TimeoutError) as error:
                msg = f"nothing more came after {self.seen!r:.2000}"
                raise AssertionError(msg) from error
        return self.seen

    async def pid(self) -> int:
        """The first event."""
        pid = (await self.until(lambda seen: seen.pid)).pid
        assert pid is not None
        return pid

    async def rest(self) -> Followed:
        """Everything."""
        return await self.until(lambda seen: seen.closed)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Caller]:
    """One guest, without its interpreter, for all tests of this module."""
    settings, processes = Settings(), Processes()
    async with served(envd.create_app(settings, processes), tmp_path_factory.mktemp("guest") / "http.sock") as http:
        yield Caller(http, settings, processes)


@pytest_asyncio.fixture(loop_scope="module")
async def caller(shared: Caller) -> AsyncIterator[Caller]:
    """The guest, with nothing in it from other tests."""
    shared.settings.init(env_vars={})
    try:
        yield shared
    finally:
        shared.processes.kill()
        for process in shared.processes:
            await asyncio.wait_for(process.ended.wait(), PATIENCE)


async def until(condition: Callable[[], object]) -> None:
    """Waits for what no event tells of."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_command_is_its_start_its_output_and_its_end(caller: Caller) -> None:
    seen = await caller.start(bash("echo out; echo err >&2"))

    assert (seen.stdout, seen.stderr, seen.error) == (b"out\n", b"err\n", None)
    assert seen.end == {"exitCode": 0, "exited": True, "status": "exit status 0"}


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("exit 3", {"exitCode": 3, "exited": True, "status": "exit status 3", "error": "exit status 3"}),
        ("kill -9 $$", {"exitCode": -1, "exited": False, "status": "signal: killed", "error": "signal: killed"}),
        (
            "kill -TERM $$",
            {"exitCode": -1, "exited": False, "status": "signal: terminated", "error": "signal: terminated"},
        ),
        ("kill -34 $$", {"exitCode": -1, "exited": False, "status": "signal: signal 34", "error": "signal: signal 34"}),
    ],
)
async def test_an_end_is_told_as_go_prints_it(caller: Caller, script: str, end: dict[str, Any]) -> None:
    assert (await caller.start(bash(script))).end == end


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGSEGV, "segmentation fault"),
        (signal.SIGXCPU, "CPU time limit exceeded"),
        (signal.SIGIO, "I/O possible"),
        (signal.SIGUSR1, "user defined signal 1"),
        (signal.SIGHUP, "hangup"),
    ],
)
async def test_signals_have_gos_names(number: int, name: str) -> None:
    assert processes._signal_name(number) == name


async def test_much_output_comes_whole_in_order_and_in_small_chunks(caller: Caller) -> None:
    script = "import sys, random; random.seed(7); data = random.randbytes(9_000_001)\n"
    message = {"process": {"cmd": "python3", "args": ["-c", script + "sys.stdout.buffer.write(data)"]}}
    expected = await asyncio.create_subprocess_exec(
        "python3", "-c", script + "import hashlib; print(hashlib.sha256(data).hexdigest())", stdout=-1
    )
    (digest, _), seen = await asyncio.gather(expected.communicate(), caller.start(message))

    assert hashlib.sha256(seen.stdout).hexdigest() == digest.decode().strip()
    assert seen.sizes["stdout"] <= 32 << 10


async def test_a_command_runs_as_a_login_would_have_it(caller: Caller, tmp_path: Path) -> None:
    caller.settings.init(env_vars={"OF_SANDBOX": "1", "BOTH": "sandbox"})
    message = {"process": {"cmd": "env", "envs": {"OF_CALL": "2", "BOTH": "call"}, "cwd": str(tmp_path)}}

    env = dict(line.split("=", 1) for line in (await caller.start(message)).stdout.decode().splitlines())

    me = account()
    assert (env["HOME"], env["USER"], env["LOGNAME"], env["SHELL"]) == (str(me.home), me.name, me.name, "/bin/bash")
    assert (env["OF_SANDBOX"], env["OF_CALL"], env["BOTH"]) == ("1", "2", "call")
    assert env["PATH"]
    assert "MPLBACKEND" not in env
    assert not set(env) & set(os.environ) - {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "PWD"}


async def test_a_command_begins_at_home_or_where_it_is_told_to(caller: Caller, tmp_path: Path) -> None:
    assert (await caller.start(bash("pwd"))).stdout.decode().strip() == str(account().home)
    assert (await caller.start(bash("pwd", cwd=str(tmp_path)))).stdout.decode().strip() == str(tmp_path)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (bash("true", cwd="/nowhere"), "cwd '/nowhere' does not exist"),
        (bash("true", cwd="/etc/passwd"), "cwd '/etc/passwd' is not a directory"),
        (bash("true", cwd="/tmp\0"), "NUL"),
        (bash("true", cwd="/" + "x" * 5000), "cwd"),
        ({"process": {"cmd": "no-such-program"}}, "error starting process 'no-such-program': No such file"),
        ({"process": {"cmd": "/etc/passwd"}}, "error starting process '/etc/passwd': Permission denied"),
        ({"process": {"cmd": "a\0b"}}, "null byte"),
        (bash("true", envs={"a=b": "c"}), "illegal environment"),
        (bash("x" * 3_000_000), "Argument list too long"),
        ({"process": {"cmd": ""}}, "`process.cmd` is missing"),
        ({"process": {}}, "`process.cmd` is missing"),
        ({}, "`process` is missing"),
        ({"process": 3}, "`process` is not an object"),
        ({"process": {"cmd": 3}}, "`cmd` is not a string"),
        ({"process": {"cmd": "true", "args": "x"}}, "`args` is not a list"),
        ({"process": {"cmd": "true", "args": [1]}}, "`args` is not a list"),
        ({"process": {"cmd": "true", "envs": {"a": 1}}}, "`envs` is not an object"),
        ({"process": {"cmd": "true"}, "pty": 1}, "`pty` is not an object"),
        ({"process": {"cmd": "true"}, "pty": {"size": 1}}, "`pty.size` is not an object"),
        ({"process": {"cmd": "true"}, "pty": {"size": {"rows": 70000}}}, "`rows` is 70000"),
        ({"process": {"cmd": "true"}, "stdin": "yes"}, "`stdin` is not true or false"),
    ],
)
async def test_what_cannot_be_started_is_an_invalid_argument(caller: Caller, message: Any, words: str) -> None:
    before = len(os.listdir("/proc/self/fd"))

    seen = await caller.start(message)

    assert seen.error is not None
    assert seen.error["code"] == "invalid_argument"
    assert words in seen.error["message"]
    assert (seen.pid, list(caller.processes)) == (None, [])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the connection


async def test_a_process_that_was_left_goes_on_and_can_be_followed_again(caller: Caller, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = f"echo early; read line < {gate}; echo $line; exit 5"
    async with caller.stream("Start", bash(script, tag="mine")) as stream:
        pid = await stream.pid()
        await stream.until(lambda seen: seen.stdout)

    async with (
        caller.stream("Connect", {"process": {"pid": pid}}) as first,
        caller.stream("Connect", {"process": {"tag": "mine"}}) as second,
    ):
        assert [await first.pid(), await second.pid()] == [pid, pid]
        await asyncio.to_thread(gate.write_text, "late\n")
        both = [await first.rest(), await second.rest()]

    assert [(seen.stdout, seen.end["exitCode"]) for seen in both if seen.end] == [(b"late\n", 5)] * 2


async def test_the_end_of_a_process_can_be_asked_for_a_while(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "RETENTION", 0.5)
    pid = (await caller.start(bash("exit 7"))).pid
    assert pid is not None

    after = await caller.connect(pid)
    assert (after.end or {})["exitCode"] == 7
    assert (await caller.call("List", {}))[1] == {"processes": []}
    assert (await caller.kill(pid))[0] == 404

    await until(lambda: caller.processes.get(pid) is None)
    gone = await caller.connect(pid)
    assert gone.error == {"code": "not_found", "message": f"process with pid {pid} not found"}


async def test_a_process_nobody_reads_is_not_blocked(caller: Caller, tmp_path: Path) -> None:
    done = tmp_path / "done"
    async with caller.stream("Start", bash(f"read; head -c 20M /dev/zero; touch {done}", stdin=True)) as stream:
        pid = await stream.pid()

    await caller.type(pid, "\n")
    await until(done.exists)


async def test_a_slow_reader_loses_nothing_and_holds_the_process_up_instead_of_filling_memory(
    caller: Caller,
) -> None:
    async with (
        caller.stream("Start", bash("head -c 30M /dev/zero | tr '\\0' x")) as slow,
    ):
        pid = await slow.pid()
        async with caller.stream("Connect", {"process": {"pid": pid}}) as quick:
            reading = asyncio.create_task(quick.rest())
            process = caller.processes.get(pid)
            assert process is not None
            await until(lambda: process._slow)
            assert sum(reader._queued for reader in process._readers) < 4 << 20
            assert not reading.done()
            whole = await slow.rest()
            part = await reading

    assert whole.stdout == b"x" * (30 << 20)
    assert set(part.stdout) == {ord("x")}
    assert part.end == whole.end


async def test_a_reader_that_leaves_no_longer_holds_the_process_up(caller: Caller) -> None:
    async with caller.stream("Start", bash("head -c 30M /dev/zero; exit 4")) as slow:
        pid = await slow.pid()
        process = caller.processes.get(pid)
        assert process is not None
        await until(lambda: process._slow)

    assert ((await caller.connect(pid)).end or {})["exitCode"] == 4


async def test_what_runs_on_in_the_background_does_not_hold_the_end_back_and_may_write_on(
    caller: Caller, tmp_path: Path
) -> None:
    gate, done = tmp_path / "gate", tmp_path / "done"
    os.mkfifo(gate)
    script = f"(read line < {gate}; head -c 3M /dev/zero; touch {done}) & echo started"

    seen = await caller.start(bash(script))

    assert (seen.stdout, (seen.end or {})["exitCode"]) == (b"started\n", 0)
    await asyncio.to_thread(gate.write_text, "go\n")
    await until(done.exists)


async def test_one_who_writes_for_ever_in_the_background_does_not_hold_the_end_back_either(caller: Caller) -> None:
    seen = await caller.start(bash("yes & echo $! >&2"))

    assert (seen.end or {})["exitCode"] == 0
    os.kill(int(seen.stderr), signal.SIGKILL)


async def test_at_the_deadline_the_process_and_its_children_are_killed(caller: Caller, tmp_path: Path) -> None:
    """The stream then ends with the error, and not with the end of the process."""
    child = tmp_path / "child"
    seen = await caller.start(bash(f"sleep 1000 & echo $! > {child}; wait"), connect_timeout_ms="500")

    assert seen.end is None
    assert (seen.error or {})["code"] == "deadline_exceeded"
    assert seen.pid is not None
    after = await caller.connect(seen.pid)
    assert (after.end or {})["status"] == "signal: killed"
    await until(lambda: not alive(int(child.read_text())))


async def test_the_deadline_holds_also_when_the_caller_has_left(caller: Caller) -> None:
    async with caller.stream("Start", bash("sleep 1000"), connect_timeout_ms="500") as stream:
        pid = await stream.pid()

    seen = await caller.connect(pid)
    assert (seen.end or {})["status"] == "signal: killed"


async def test_the_deadline_of_a_reader_kills_nothing(caller: Caller) -> None:
    async with caller.stream("Start", bash("read; echo $REPLY", stdin=True)) as stream:
        pid = await stream.pid()
        async with caller.stream("Connect", {"process": {"pid": pid}}, connect_timeout_ms="100") as other:
            assert ((await other.rest()).error or {})["code"] == "deadline_exceeded"
        await caller.type(pid, "alive\n")
        assert (await stream.rest()).stdout == b"alive\n"


@pytest.mark.asyncio(loop_scope="function")  # what else is in the loop would be lost in time
async def test_time_that_the_sandbox_sleeps_is_not_time_that_a_process_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of days, which the clock shows afterwards, counts as two ticks at most."""
    loop = asyncio.get_running_loop()
    true_time, jump = loop.time, [0.0]
    monkeypatch.setattr(loop, "time", lambda: true_time() + jump[0])
    began = true_time()
    sleeping = asyncio.create_task(processes.awake(4 * processes.TICK))
    await asyncio.sleep(0)
    jump[0] = 86400.0

    await asyncio.wait_for(sleeping, None)

    assert true_time() - began >= 2 * processes.TICK


async def test_silence_is_filled_with_keepalives(caller: Caller) -> None:
    async with caller.stream("Start", bash("read", stdin=True), keepalive_ping_interval="1") as stream:
        await stream.until(lambda seen: seen.keepalives == 2)


async def test_processes_are_listed_as_they_were_started(caller: Caller, tmp_path: Path) -> None:
    message = {
        "process": {"cmd": "sleep", "args": ["1000"], "envs": {"A": "1"}, "cwd": str(tmp_path)},
        "tag": "napping",
    }
    async with caller.stream("Start", message) as stream:
        pid = await stream.pid()
        found = (await caller.call("List", {}))[1]["processes"]

    assert found == [{"config": message["process"], "pid": pid, "tag": "napping"}]


async def test_input_arrives_in_order_until_it_is_closed(caller: Caller) -> None:
    async with caller.stream("Start", {"process": {"cmd": "cat"}}) as stream:
        pid = await stream.pid()
        for text in ("ä", "b", "c"):
            assert await caller.type(pid, text) == (200, {})
        assert await caller.call("CloseStdin", {"process": {"pid": pid}}) == (200, {})
        seen = await stream.rest()

    assert seen.stdout == "äbc".encode()


async def test_input_can_be_closed_twice(caller: Caller) -> None:
    async with caller.stream("Start", bash("sleep 1000", stdin=True)) as stream:
        pid = await stream.pid()
        for _ in range(2):
            assert await caller.call("CloseStdin", {"process": {"pid": pid}}) == (200, {})
        assert "closed" in (await caller.type(pid, "x"))[1]["message"]


async def test_input_of_any_length_waits_for_the_process_to_take_it(caller: Caller) -> None:
    async with caller.stream("Start", bash("read; sha256sum", stdin=True)) as stream:
        pid = await stream.pid()
        big = "x" * 2_000_000
        sending = asyncio.create_task(caller.type(pid, big))
        process = caller.processes.get(pid)
        assert process is not None
        assert process.input is not None
        await until(process.input._turn.locked)
        following = asyncio.create_task(caller.type(pid, "\nend"))
        closing = asyncio.create_task(caller.call("CloseStdin", {"process": {"pid": pid}}))
        assert [answer[0] for answer in await asyncio.gather(sending, following, closing)] == [200] * 3
        seen = await stream.rest()

    assert seen.stdout.split()[0].decode() == hashlib.sha256(b"end").hexdigest()


async def test_a_stream_of_input_is_written_as_it_comes(caller: Caller) -> None:
    async with caller.stream("Start", {"process": {"cmd": "cat"}}) as stream:
        pid = await stream.pid()

        async def pieces() -> AsyncIterator[bytes]:
            yield envelope({"start": {"process": {"pid": pid}}})
            for number in range(3):
                yield envelope({"data": {"input": {"stdin": base64.b64encode(b"%d\n" % number).decode()}}})
                # The one before has arrived while this stream is still open.
                await stream.until(lambda seen, number=number: b"%d\n" % number in seen.stdout)  # type: ignore[misc]
            yield envelope({"keepalive": {}})

        answer = await caller.http.post("/process.Process/StreamInput", content=pieces(), headers=STREAM)

    assert list(Envelopes().feed(answer.content)) == [(0, {}), (2, {})]


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"data": {"input": {"stdin": "eA=="}}}], "invalid_argument"),
        ([{"start": {"process": {"pid": 4_000_000}}}], "not_found"),
        ([{"other": {}}], "invalid_argument"),
        ([{"start": {}}], "invalid_argument"),
    ],
)
async def test_a_stream_of_input_that_makes_no_sense_is_refused(caller: Caller, messages: list[Any], code: str) -> None:
    body = b"".join(map(envelope, messages))
    answer = await caller.http.post("/process.Process/StreamInput", content=body, headers=STREAM)

    ((flags, last),) = Envelopes().feed(answer.content)
    assert (flags, last["error"]["code"]) == (2, code)


async def test_input_that_cannot_be_given_is_an_error(caller: Caller) -> None:
    async with caller.stream("Start", bash("sleep 1000")) as stream:
        pid = await stream.pid()
        status, answer = await caller.type(pid, "x")
        assert (status, answer["code"]) == (500, "internal")
        assert "stdin not enabled" in answer["message"]
        assert (await caller.type(pid, "x", "pty"))[1]["code"] == "internal"
        status, answer = await caller.call("SendInput", {"process": {"pid": pid}, "input": {"stdin": "?"}})
        assert (status, answer["code"]) == (400, "invalid_argument")
    async with caller.stream("Start", bash("exec <&-; echo; sleep 1000", stdin=True)) as stream:
        pid = await stream.pid()
        await stream.until(lambda seen: seen.stdout)
        assert "broken pipe" in (await caller.type(pid, "x"))[1]["message"]


async def test_input_that_waits_is_refused_when_the_process_ends(caller: Caller) -> None:
    """Even where somebody in the background still holds the other end of it."""
    async with caller.stream("Start", bash("sleep 1000 & echo; sleep 1000", stdin=True)) as stream:
        pid = await stream.pid()
        await stream.until(lambda seen: seen.stdout)
        process = caller.processes.get(pid)
        assert process is not None
        assert process.input is not None
        sending = asyncio.create_task(caller.type(pid, "x" * 2_000_000))
        await until(process.input._turn.locked)
        await caller.kill(pid, "SIGNAL_SIGTERM")
        status, answer = await sending

    assert (status, answer["code"]) == (500, "internal")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def test_signals_are_sigterm_and_sigkill(caller: Caller) -> None:
    async with caller.stream("Start", bash("trap 'echo asked; exit 9' TERM; echo; while :; do sleep 0.05; done")) as s:
        pid = await s.pid()
        await s.until(lambda seen: seen.stdout)
        assert (await caller.kill(pid, "SIGNAL_SIGHUP"))[0] == 501
        assert (await caller.kill(pid, None))[0] == 501  # type: ignore[arg-type]
        assert await caller.kill(pid, "SIGNAL_SIGTERM") == (200, {})
        seen = await s.rest()

    assert (seen.stdout, (seen.end or {})["exitCode"]) == (b"\nasked\n", 9)


async def test_sigkill_takes_the_whole_command_along(caller: Caller) -> None:
    async with caller.stream("Start", bash("sleep 1000 & echo $!; wait")) as stream:
        pid = await stream.pid()
        child = int((await stream.until(lambda seen: seen.stdout)).stdout)
        assert await caller.kill(pid) == (200, {})
        seen = await stream.rest()

    assert (seen.end or {})["status"] == "signal: killed"
    await until(lambda: not alive(child))


@pytest.mark.parametrize("method", ["SendInput", "CloseStdin", "SendSignal", "Update"])
async def test_an_unknown_process_is_not_found(caller: Caller, method: str) -> None:
    for selector in ({"pid": 4_000_000}, {"pid": "4000000"}, {"tag": "nobody"}):
        status, answer = await caller.call(method, {"process": selector, "input": {}, "signal": "SIGNAL_SIGKILL"})
        assert (status, answer["code"]) == (404, "not_found")
    for selector in ({}, {"pid": -1}, {"pid": True}, {"pid": "x"}, {"tag": 3}):
        status, answer = await caller.call(method, {"process": selector, "input": {}, "signal": "SIGNAL_SIGKILL"})
        assert (status, answer["code"]) == (400, "invalid_argument")


async def test_an_unknown_user_is_unauthenticated(caller: Caller) -> None:
    seen = await caller.start(bash("true"), **basic("nobody-of-that-name"))

    assert (seen.error or {})["code"] == "unauthenticated"


TERMINAL = {
    "process": {"cmd": "/bin/bash", "args": ["--norc", "-i"], "envs": {"TERM": "xterm-256color", "PS1": "[\\#] "}},
    "pty": {"size": {"cols": 91, "rows": 33}},
}


async def test_a_terminal_is_a_real_one(caller: Caller) -> None:
    async with caller.stream("Start", TERMINAL) as stream:
        pid = await stream.pid()
        await caller.type(pid, "tty -s && stty size; echo $TERM; x=21\n", "pty")
        await stream.until(lambda seen: b"33 91" in seen.pty and b"xterm-256color" in seen.pty)
        resized = {"process": {"pid": pid}, "pty": {"size": {"cols": 40, "rows": 20}}}
        assert await caller.call("Update", resized) == (200, {})
        await caller.type(pid, "stty size; echo $((x * 2))\n", "pty")
        await stream.until(lambda seen: b"20 40" in seen.pty and b"42" in seen.pty)
        # The keyboard's interrupt reaches the foreground alone.
        await caller.type(pid, "sh -c 'echo go\"\"ing; sleep 1000'\n", "pty")
        await stream.until(lambda seen: b"going" in seen.pty)
        await caller.type(pid, "\x03", "pty")
        assert (await caller.call("CloseStdin", {"process": {"pid": pid}}))[1]["code"] == "failed_precondition"
        await stream.until(lambda seen: b"[4] " in seen.pty)  # the prompt for the fourth command
        await caller.type(pid, "exit 6\n", "pty")
        seen = await stream.rest()

    assert (seen.end or {})["exitCode"] == 6
    assert (seen.stdout, seen.stderr) == (b"", b"")


READLINE = """
from termios import tcgetwinsize, tcsetwinsize

old = tcgetwinsize(0)
print("read")
while tcgetwinsize(0) == old:
    pass
tcsetwinsize(0, old)
print("written back")
while tcgetwinsize(0) == old:
    pass
print("then", *tcgetwinsize(0))
"""
"""What readline does to a terminal that is resized in the middle of it."""


async def test_a_terminal_keeps_a_new_size_though_its_program_writes_back_the_former_one(caller: Caller) -> None:
    message = {**TERMINAL, "process": {"cmd": sys.executable, "args": ["-uc", READLINE]}}
    async with caller.stream("Start", message) as stream:
        pid = await stream.pid()
        await stream.until(lambda seen: b"read" in seen.pty)
        resized = {"process": {"pid": pid}, "pty": {"size": {"cols": 40, "rows": 20}}}
        assert await caller.call("Update", resized) == (200, {})
        seen = await stream.rest()

    assert seen.pty.endswith(b"written back\r\nthen 20 40\r\n")


async def test_a_terminals_output_comes_in_chunks_of_its_own_size(caller: Caller) -> None:
    message = {**TERMINAL, "process": {"cmd": "head", "args": ["-c", "1000000", "/dev/zero"]}}

    seen = await caller.start(message)

    assert seen.pty == bytes(1_000_000)
    assert seen.sizes["pty"] <= 16 << 10


async def test_only_a_terminal_has_a_size(caller: Caller) -> None:
    async with caller.stream("Start", bash("sleep 1000")) as stream:
        pid = await stream.pid()
        resized = {"process": {"pid": pid}, "pty": {"size": {"cols": 40, "rows": 20}}}
        assert (await caller.call("Update", resized))[1]["code"] == "internal"


async def test_what_ended_leaves_nothing_behind(caller: Caller) -> None:
    await caller.start(bash("true"))
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(5):
        await caller.start(bash("cat", stdin=True), connect_timeout_ms="50")
        await caller.start(TERMINAL | {"process": {"cmd": "true"}})
        await caller.start(bash("exit 1"))

    await until(lambda: not list(caller.processes))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("seed", range(30))
async def test_no_bytes_at_all_bring_it_down(caller: Caller, seed: int) -> None:
    """Whatever is sent to whatever method, it is answered in Connect's words."""
    import random

    dice = random.Random(seed)
    good = envelope({"process": {"pid": 1}})
    for method in ("Start", "Connect", "StreamInput"):
        data = bytearray(good * 3)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        body = bytes(data[: dice.randrange(len(data))])
        answer = await caller.http.post(f"/process.Process/{method}", content=body, headers=STREAM)
        *_, (flags, last) = Envelopes().feed(answer.content)
        assert (answer.status_code, flags) == (200, 2)
        assert "internal" not in json.dumps(last)
