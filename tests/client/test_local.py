from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_tools.client import Client
from sandbox_tools.client.dialects import Address
from sandbox_tools.client.local import LocalEngine
from sandbox_tools.client.transport import Call, Transport
from sandbox_tools.errors import ConfigError, EngineError, NotFoundError
from tests.client.server import Server

# A stand-in that keeps the engine's promises to those who start it: the lock, exit code 3, /health on the socket.
ENGINE = """
import fcntl, http.server, json, os, socket, socketserver, sys, threading, time
mode, state = sys.argv[1], sys.argv[3]
assert sys.argv[2] == "--state-dir" and os.getcwd() == os.path.realpath(state)
with open(state + "/starts", "a") as starts:
    starts.write(f"{os.getpid()}\\n")
if mode == "dies":
    sys.exit("no runsc anywhere")
lock = open(state + "/engine.lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
if mode == "silent":
    threading.Event().wait(20)
answers = ["building the template", "warming the template"] if mode == "prepares" else []
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/health":
            return self.answer(404, {"code": 404, "message": "no such sandbox"})
        message = answers.pop(0) if answers else "still building" if mode == "never" else None
        if mode == "foreign":
            return self.answer(503, "not of the protocol")
        self.answer(503 if message else 200, {"code": 503, "message": message})
    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def address_string(self):
        return "local"
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
if os.path.exists(state + "/engine.sock"):
    os.unlink(state + "/engine.sock")
server = Server(state + "/engine.sock", Health)
threading.Timer(20, server.shutdown).start()
server.serve_forever()
"""


@pytest.fixture
def state(state: Path) -> Iterator[Path]:
    """A state directory whose engines are ended after the test."""
    yield state
    for pid in pids(state):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def pids(state: Path) -> list[int]:
    starts = state / "starts"
    return list(map(int, starts.read_text().split())) if starts.exists() else []


def engine(state: Path, mode: str = "plain", **limits: float) -> LocalEngine:
    waits: list[str] = []
    local = LocalEngine(state, on_wait=waits.append, command=[sys.executable, "-c", ENGINE, mode], **limits)
    local.waits = waits  # type: ignore[attr-defined]
    return local


async def test_an_engine_that_is_not_there_is_started_once_and_found_again(state: Path) -> None:
    await engine(state).ready()
    await engine(state).ready()

    assert 1 == len(pids(state))


async def test_an_engine_that_runs_is_not_started(server: Server, state: Path) -> None:
    await engine(state).ready()

    assert [] == pids(state)


async def test_clients_that_start_at_once_end_up_at_one_engine(state: Path) -> None:
    """All but one engine find the lock taken and go; their clients wait for the one that stays."""
    await asyncio.gather(*(engine(state, "prepares").ready() for _ in range(4)))
    deadline = time.monotonic() + 10
    while len(alive := [pid for pid in pids(state) if Path(f"/proc/{pid}").exists()]) > 1:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)

    assert 1 == len(alive)
    assert len(pids(state)) > 1


async def test_an_engine_that_was_just_leaving_is_replaced(state: Path) -> None:
    """It still holds the lock, so the new one gives way, but nobody comes up: there must be another attempt."""
    with (state / "engine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = asyncio.create_task(engine(state, start_limit=10).ready())
        deadline = time.monotonic() + 10
        while not pids(state) or Path(f"/proc/{pids(state)[0]}").exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
    await ready

    assert len(pids(state)) > 1


async def test_an_engine_that_went_away_is_started_again(state: Path) -> None:
    local = engine(state)
    await local.ready()
    os.kill(pids(state)[0], signal.SIGKILL)
    local.lost()
    await local.ready()

    assert 2 == len(pids(state))


async def test_a_call_that_finds_the_engine_gone_starts_it_and_is_sent_again(state: Path) -> None:
    """An engine with nothing to do exits; whoever calls next does not notice. The stand-in knows no sandboxes."""
    local = engine(state)
    transport = Transport(Address(api_url="http://localhost"), request_timeout=5, engine=local)
    for number in (1, 2):
        with pytest.raises(NotFoundError):
            await transport.send(Call(op="info", method="GET", path="/sandboxes/i1"))
        assert number == len(pids(state))
        os.kill(pids(state)[-1], signal.SIGKILL)
    await transport.aclose()


async def test_preparing_is_waited_for_and_told(state: Path) -> None:
    local = engine(state, "prepares")
    await local.ready()

    expected = ["Starting the engine.", "building the template", "warming the template"]
    assert expected == local.waits  # type: ignore[attr-defined]


async def test_an_engine_that_dies_shows_the_end_of_its_log(state: Path) -> None:
    (state / "engine.log").write_text("from an earlier life\n")

    with pytest.raises(EngineError) as caught:
        await engine(state, "dies").ready()
    assert ("no runsc anywhere", 1) == (caught.value.stderr, caught.value.exit_code)


@pytest.mark.parametrize(
    ("mode", "limit"), [("silent", {"start_limit": 0.5}), ("never", {"prepare_limit": 0.5}), ("foreign", {})]
)
async def test_an_engine_that_never_gets_ready_is_not_waited_for_without_end(
    state: Path, mode: str, limit: dict[str, float]
) -> None:
    with pytest.raises(EngineError):
        await engine(state, mode, **limit).ready()


async def test_an_engine_outlives_its_starters_terminal_and_leaves_no_zombie(state: Path) -> None:
    await engine(state).ready()
    (pid,) = pids(state)

    assert pid == os.getsid(pid)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


async def test_an_engine_inherits_no_open_files(state: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        await engine(state).ready()
        links = [os.readlink(f"/proc/{pids(state)[0]}/fd/{fd}") for fd in os.listdir(f"/proc/{pids(state)[0]}/fd")]
        assert os.readlink(f"/proc/self/fd/{write}") not in links
    finally:
        os.close(read)
        os.close(write)


async def test_a_state_directory_that_cannot_be_used_is_named(state: Path) -> None:
    (state / "file").touch()

    with pytest.raises(ConfigError, match="SANDBOX_TOOLS_STATE_DIR"):
        await engine(state / "file" / "below").ready()


def test_a_socket_path_that_is_too_long_is_refused_at_once(state: Path) -> None:
    with pytest.raises(ConfigError, match="SANDBOX_TOOLS_STATE_DIR"):
        Client(provider="local", state_dir=state / ("x" * 100))


async def test_the_log_and_a_new_state_directory_are_private(state: Path) -> None:
    await engine(state / "new").ready()

    try:
        assert 0o700 == (state / "new").stat().st_mode & 0o777
        assert 0o600 == (state / "new" / "engine.log").stat().st_mode & 0o777
    finally:
        os.kill(pids(state / "new")[0], signal.SIGKILL)
