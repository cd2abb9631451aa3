"""Commands and terminals in a real sandbox: users, environments, ends, and what a pause and a kill do to them."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from sandbox_tools.guest.envelopes import envelope
from tests.machine import Box, EngineProcess
from tests.rpc import STREAM, Envelopes, Followed, bash, basic

TERMINAL = {
    "process": {"cmd": "/bin/bash", "args": ["-i", "-l"], "envs": {"TERM": "xterm-256color", "LANG": "C.UTF-8"}},
    "pty": {"size": {"cols": 91, "rows": 33}},
}


class Commands:
    """The process service of one sandbox, over the wire."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.headers = {**box.headers, "E2b-Sandbox-Port": "49983"}

    @contextlib.contextmanager
    def stream(self, method: str, message: Any, **headers: str) -> Iterator[Stream]:
        """A stream as it comes; leaving early breaks the connection."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        with (
            self.box.engine.http() as http,
            http.stream(
                "POST",
                f"/process.Process/{method}",
                content=envelope(message),
                headers={**STREAM, **self.headers, **more},
            ) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            yield Stream(answer)

    def run(self, script: str, *, headers: dict[str, str] | None = None, **more: Any) -> Followed:
        """A command as the SDKs run it, to its end."""
        with self.stream("Start", bash(script, login=True, **more), **(headers or {})) as stream:
            return stream.rest()

    def call(self, method: str, message: Any) -> Any:
        """The answer to a unary call that must succeed."""
        with self.box.engine.http() as http:
            answer = http.post(f"/process.Process/{method}", json=message, headers=self.headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def type(self, pid: int, text: str, kind: str = "pty") -> None:
        """Input."""
        data = base64.b64encode(text.encode()).decode()
        self.call("SendInput", {"process": {"pid": pid}, "input": {kind: data}})


class Stream:
    """The events of a process as they come."""

    def __init__(self, answer: httpx.Response) -> None:
        self._bytes = answer.iter_bytes()
        self._envelopes = Envelopes()
        self.seen = Followed()

    def until(self, enough: Callable[[Followed], object]) -> Followed:
        """What was seen once it is enough."""
        while not enough(self.seen):
            self.seen.take(self._envelopes.feed(next(self._bytes)))
        return self.seen

    @property
    def pid(self) -> int:
        """The first event."""
        pid = self.until(lambda seen: seen.pid).pid
        assert pid is not None
        return pid

    def rest(self) -> Followed:
        """Everything."""
        return self.until(lambda seen: seen.closed)


@pytest.fixture(scope="module")
def commands(engine: EngineProcess) -> Iterator[Commands]:
    """One sandbox for all tests of this module that leave it running."""
    box = engine.create(envVars={"OF_SANDBOX": "1", "BOTH": "sandbox"})
    yield Commands(box)
    box.kill()


def pause_and_connect(box: Box) -> None:
    """Through the disk and back."""
    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201


def test_a_command_runs_as_the_user_whom_a_sandbox_is_for(commands: Commands) -> None:
    seen = commands.run("id -un; id -Gn; pwd; echo $HOME $USER $LOGNAME $SHELL; touch a; stat -c %U a; echo $PATH")

    lines = seen.stdout.decode().splitlines()
    assert lines[:5] == ["user", "user", "/home/user", "/home/user user user /bin/bash", "user"]
    assert "/usr/bin" in lines[5]
    assert seen.end == {"exitCode": 0, "exited": True, "status": "exit status 0"}


def test_a_command_runs_as_root_where_it_is_told_to(commands: Commands) -> None:
    seen = commands.run("id -u; pwd; echo $HOME; cat /proc/self/status | grep CapEff", headers=basic("root"))

    lines = seen.stdout.decode().split()
    assert lines[:3] == ["0", "/root", "/root"]


def test_an_ordinary_user_has_none_of_roots_powers(commands: Commands) -> None:
    seen = commands.run("grep CapEff /proc/self/status; cat /etc/shadow; ls /root")

    assert int(seen.stdout.split()[1], 16) == 0
    assert seen.stderr.count(b"Permission denied") == 2


def test_an_unknown_user_is_refused(commands: Commands) -> None:
    assert (commands.run("true", headers=basic("mallory")).error or {})["code"] == "unauthenticated"


def test_the_variables_of_the_sandbox_and_of_the_call_are_there(commands: Commands) -> None:
    seen = commands.run("echo $OF_SANDBOX $OF_CALL $BOTH ${MPLBACKEND-none}", envs={"OF_CALL": "2", "BOTH": "call"})

    assert seen.stdout.split() == [b"1", b"2", b"call", b"none"]


def test_a_command_begins_where_it_is_told_to(commands: Commands) -> None:
    assert commands.run("pwd", cwd="/var/tmp").stdout == b"/var/tmp\n"
    seen = commands.run("pwd", cwd="/nowhere")
    assert seen.error == {"code": "invalid_argument", "message": "cwd '/nowhere' does not exist"}


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ("exit 3", "exit status 3", 3),
        ("kill -9 $$", "signal: killed", -1),
        ("sleep 1000 &", "exit status 0", 0),
    ],
)
def test_an_end_is_told(commands: Commands, script: str, status: str, code: int) -> None:
    end = commands.run(script).end

    assert end is not None
    assert (end["status"], end["exitCode"]) == (status, code)


@pytest.mark.parametrize("user", ["user", "root"])
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("no-such-program", "No such file or directory"),
        ("/no/such/program", "No such file or directory"),
        ("./program", "No such file or directory"),
        ("/etc/passwd", "Permission denied"),
        ("/etc", "Permission denied"),
    ],
)
def test_a_program_that_is_none_is_said(commands: Commands, user: str, program: str, words: str) -> None:
    with commands.stream("Start", {"process": {"cmd": program}}, **basic(user)) as stream:
        error = stream.rest().error

    assert error is not None
    assert error["code"] == "invalid_argument"
    assert f"error starting process '{program}': " in error["message"]
    assert words in error["message"]


def test_a_program_beside_the_working_directory_is_found(commands: Commands) -> None:
    commands.run("printf '#!/bin/sh\\necho $0 $1' > /var/tmp/program; chmod +x /var/tmp/program")
    with commands.stream("Start", {"process": {"cmd": "./program", "args": ["a b"], "cwd": "/var/tmp"}}) as stream:
        assert stream.rest().stdout == b"./program a b\n"


def test_at_the_deadline_the_command_is_killed_with_all_that_it_started(commands: Commands) -> None:
    seen = commands.run("sleep 4321 & sleep 4321; echo", headers={"connect-timeout-ms": "1000"})

    assert (seen.end, (seen.error or {})["code"]) == (None, "deadline_exceeded")
    assert commands.run("while pgrep -f 'sleep 4321$'; do sleep 0.1; done").end == {
        "exitCode": 0,
        "exited": True,
        "status": "exit status 0",
    }


def test_much_output_arrives_whole(commands: Commands) -> None:
    seen = commands.run("head -c 20000003 /dev/zero | tr '\\0' x; echo end >&2")

    assert (len(seen.stdout), seen.stdout.count(b"x"), seen.stderr) == (20_000_003, 20_000_003, b"end\n")


def test_a_terminal_has_its_size_its_user_and_its_signals(commands: Commands) -> None:
    with commands.stream("Start", TERMINAL) as stream:
        pid = stream.pid
        commands.type(pid, "stty size; id -un; stat -c %U $(tty)\n")
        stream.until(lambda seen: b"33 91" in seen.pty and seen.pty.count(b"user\r\n") >= 2)
        # What is typed is shown as well, so that what is looked for must not be in it.
        handler = "signal.signal(signal.SIGWINCH, lambda *_: print('re' 'sized'))"
        code = f"import signal; {handler}; print('re' 'ady'); [signal.pause() for _ in range(9)]"
        commands.type(pid, f'python3 -c "{code}"\n')
        stream.until(lambda seen: b"ready" in seen.pty)
        commands.call("Update", {"process": {"pid": pid}, "pty": {"size": {"cols": 40, "rows": 20}}})
        stream.until(lambda seen: b"resized" in seen.pty)
        commands.type(pid, "\x03")
        stream.until(lambda seen: b"KeyboardInterrupt" in seen.pty)
        commands.type(pid, "stty size; exit 6\n")
        seen = stream.rest()

    assert b"20 40" in seen.pty
    assert (seen.end or {})["exitCode"] == 6


def test_a_terminal_that_is_killed_takes_along_what_runs_in_it(commands: Commands) -> None:
    with commands.stream("Start", TERMINAL) as stream:
        pid = stream.pid
        commands.type(pid, "sh -c 'echo r\"\"eady; sleep 4322; true'\n")
        stream.until(lambda seen: b"ready" in seen.pty)
        commands.call("SendSignal", {"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"})
        assert (stream.rest().end or {})["status"] == "signal: killed"

    assert (commands.run("while pgrep -f 'sleep 4322$'; do sleep 0.1; done").end or {})["exitCode"] == 0


def test_after_a_pause_a_command_goes_on_and_can_be_followed_again(engine: EngineProcess) -> None:
    """The streams are cut at the pause; process ids, what the shells hold in memory, and input go on."""
    box = engine.create()
    commands = Commands(box)
    counting = bash("n=40; echo ready; while read line; do n=$((n + 1)); echo $n $line; done; exit 7", stdin=True)
    with contextlib.ExitStack() as stack:
        shell = stack.enter_context(commands.stream("Start", TERMINAL))
        commands.type(shell.pid, "secret=hidden; cd /var/tmp; echo r''eady\n")
        shell.until(lambda seen: b"ready" in seen.pty)
        counter = stack.enter_context(commands.stream("Start", {**counting, "tag": "counter"}, connect_timeout_ms="0"))
        commands.type(counter.pid, "before\n", "stdin")
        counter.until(lambda seen: b"41 before" in seen.stdout)
        limited = stack.enter_context(commands.stream("Start", bash("sleep 1000"), connect_timeout_ms="5000"))
        pids = [shell.pid, counter.pid, limited.pid]

        assert box.post("pause").status_code == 204
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            counter.rest()

    assert box.post("connect", timeout=600).status_code == 201
    found = {process["pid"]: process.get("tag") for process in commands.call("List", {})["processes"]}
    assert found.items() >= {pids[0]: None, pids[1]: "counter"}.items()

    with commands.stream("Connect", {"process": {"tag": "counter"}}) as again:
        assert again.pid == pids[1]
        commands.type(pids[1], "after\n", "stdin")
        again.until(lambda seen: b"42 after" in seen.stdout)
        commands.call("CloseStdin", {"process": {"pid": pids[1]}})
        assert (again.rest().end or {})["exitCode"] == 7

    with commands.stream("Connect", {"process": {"pid": pids[0]}}) as again:
        assert again.pid == pids[0]
        commands.type(pids[0], "echo $secret in $PWD; exit 8\n")
        seen = again.rest()
        assert b"hidden in /var/tmp" in seen.pty
        assert (seen.end or {})["exitCode"] == 8

    # A deadline from before the pause still holds.
    with commands.stream("Connect", {"process": {"pid": pids[2]}}) as again:
        assert (again.rest().end or {})["status"] == "signal: killed"
    box.kill()


def test_when_its_sandbox_is_killed_a_stream_breaks_and_does_not_end(engine: EngineProcess) -> None:
    """Whoever reads must not take half an output for the whole of it."""
    box = engine.create()
    with Commands(box).stream("Start", bash("echo; sleep 1000")) as stream:
        stream.until(lambda seen: seen.stdout)
        assert box.kill() == 204
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            stream.rest()

    assert (stream.seen.end, stream.seen.error, stream.seen.closed) == (None, None, False)
