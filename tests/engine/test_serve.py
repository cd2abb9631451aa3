"""The engine as a process: one per state directory, and plain words where it can't start."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from sandbox_tools import Client
from tests.conftest import own_state, running_engine
from tests.machine import PATIENCE, EngineProcess


def refusal(state: Path, *options: str, **environment: str) -> tuple[int, str]:
    """The exit code and words of an engine that does not come up."""
    command = [sys.executable, "-m", "sandbox_tools", "serve", "--state-dir", str(state), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **environment})
    return ended.returncode, ended.stderr


def test_a_second_engine_on_a_state_directory_leaves_the_first_alone(engine: EngineProcess) -> None:
    code, words = refusal(engine.state)

    assert code == 3
    assert "Another engine runs on" in words
    with engine.http() as http:
        assert http.get("/health").status_code == 200


def test_the_socket_is_its_owners_only(engine: EngineProcess) -> None:
    mode = (engine.state / "engine.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_a_state_directory_that_cannot_be_used_is_named() -> None:
    with own_state() as directory:
        (directory / "file").write_text("")
        code, words = refusal(directory / "file")

    assert code == 1
    assert str(directory / "file") in words
    assert "SANDBOX_TOOLS_STATE_DIR" in words


def test_a_path_too_long_for_a_socket_is_said_before_anything_is_done() -> None:
    with own_state() as directory:
        code, words = refusal(directory / ("x" * 120))

    assert code == 1
    assert "107 bytes" in words


def test_a_port_that_is_taken_is_said(templates: Path) -> None:
    with own_state() as state, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, words = refusal(state, "--host", "127.0.0.1", "--port", str(port))

    assert code == 1
    assert str(port) in words


def test_a_socket_that_another_process_listens_on_is_left_to_it(templates: Path) -> None:
    with own_state() as state, socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(state / "taken.sock"))
        taken.listen()
        code, words = refusal(state / "own", "--uds", str(state / "taken.sock"))
        assert (state / "taken.sock").exists()

    assert code == 1
    assert "taken" in words


@pytest.mark.parametrize(
    ("script", "expected"),
    [(None, "runsc-of-the-test"), ("#!/bin/sh\necho 'runsc version 0.0~20221219.0'\n", "20221219")],
    ids=["missing", "too old"],
)
def test_without_a_usable_runsc_it_says_what_to_install_and_what_to_use_instead(
    script: str | None, expected: str
) -> None:
    with own_state() as state:
        runsc = state / "runsc-of-the-test"
        if script is not None:
            runsc.write_text(script)
            runsc.chmod(0o755)
        code, words = refusal(state, SANDBOX_TOOLS_RUNSC=str(runsc))

    assert code == 1
    assert expected in words
    assert "E2B_API_KEY" in words


async def answer_of_a_client(url: str, key: str) -> str | None:
    """What another machine's client gets from the engine at an address."""
    async with Client(provider="local", api_url=url, api_key=key) as client:
        sandbox = await client.create()
        try:
            return (await sandbox.run_code("40 + 2")).text
        finally:
            await sandbox.kill()


def test_on_tcp_every_call_but_health_needs_the_key(templates: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with own_state() as state:
        engine = EngineProcess(state, options=("--host", "127.0.0.1", "--port", str(port), "--api-key", "secret"))
        engine.spawn()
        try:
            transport = httpx.HTTPTransport(retries=20)
            with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as http:
                while http.get("/health").status_code != 200:
                    pass
                assert http.get("/v2/sandboxes").status_code == 401
                assert http.get("/metrics").status_code == 401
                assert http.get("/v2/sandboxes", headers={"X-API-KEY": "wrong"}).status_code == 401
                assert http.get("/v2/sandboxes", headers={"X-API-KEY": "secret"}).json() == []
            assert asyncio.run(answer_of_a_client(f"http://127.0.0.1:{port}", "secret")) == "42"
        finally:
            engine.stop()
        assert "secret" not in engine.log()


def test_an_engine_with_nothing_to_do_exits_and_what_is_paused_is_there_for_the_next(templates: Path) -> None:
    with running_engine("--idle-exit", "0.5") as engine:
        box = engine.create()
        box.run("kept = 'yes'")
        box.post("pause")

        assert engine.process is not None
        assert engine.process.wait(PATIENCE) == 0

        engine.start()
        box.post("connect", timeout=600)
        assert box.value("kept") == "yes"
        box.kill()


def test_as_an_ordinary_user_sandboxes_pause_and_wake_too(templates: Path) -> None:
    """Run by root, the test takes an ordinary user's place in a user namespace, without root's rights on the host."""
    prefix = ("unshare", "--user", "--map-user=1000", "--map-group=1000") if os.geteuid() == 0 else ()
    with own_state() as state:
        engine = EngineProcess(state, prefix=prefix).start()
        try:
            box = engine.create()
            pid = box.value("import os; kept = 'yes'; open('/home/user/file', 'w').write('kept'); os.getpid()")

            assert box.post("pause").status_code == 204
            box.wait_for_no_process()
            assert box.post("connect", timeout=600).status_code == 201

            assert box.value("kept, open('file').read(), os.getpid()") == f"('yes', 'kept', {pid})"

            assert box.post("freeze").status_code == 204
            assert "frozenSince" in box.info()
            assert box.value("os.getpid()") == pid
            box.kill()
        finally:
            engine.stop()
        assert engine.containers() == []
