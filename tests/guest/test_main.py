"""The guest as the process that it is in a sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two ports of the loopback that were free a moment ago."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        first, second = (each.getsockname()[1] for each in sockets)
        return first, second


@pytest.fixture
def runtime_directory() -> Iterator[Path]:
    """Its path is short enough for socket names, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="guest-") as path:
        yield Path(path)


@pytest.fixture
def process(ports: tuple[int, int], runtime_directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A guest with limited memory; its standard output is watched for strays."""
    arguments = ["--envd-port", str(ports[0]), "--interpreter-port", str(ports[1]), "--limit-memory"]
    running = subprocess.Popen(
        [sys.executable, "-m", "sandbox_tools.guest.main", *arguments, "--runtime-dir", str(runtime_directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield running
    running.kill()
    running.communicate(timeout=10)


def test_it_serves_both_ports_limits_memory_and_leaves_nothing_at_sigterm(
    process: subprocess.Popen[bytes], ports: tuple[int, int], runtime_directory: Path
) -> None:
    """No process, no socket file, and not one byte on standard output, which is the tunnel's."""
    envd, interpreter = (httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) for port in ports)
    with envd, interpreter:
        _wait_for(interpreter)
        assert envd.get("/health").status_code == 204
        envd.post("/init", json={"envVars": {"GIVEN": "by the engine"}})
        code = "import os, resource\nos.getpid(), resource.getrlimit(resource.RLIMIT_AS)[0], os.environ['GIVEN']"
        answer = interpreter.post("/execute", json={"code": code}).text
        assert "by the engine" in answer
        pid, limit = (int(word.strip(" (")) for word in answer.split('"text":"')[1].split(",")[:2])
        assert 512 << 20 <= limit < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        too_much = interpreter.post("/execute", json={"code": f"b'x' * {limit}"}).text
        assert "MemoryError" in too_much

    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)

    assert process.returncode == 0, stderr.decode()
    assert stdout == b""
    assert not Path(f"/proc/{pid}").exists()
    assert list(runtime_directory.iterdir()) == []


def test_a_port_that_is_taken_ends_it_with_a_word_about_it(
    process: subprocess.Popen[bytes], ports: tuple[int, int], runtime_directory: Path
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}", timeout=30) as interpreter:
        _wait_for(interpreter)
    second = subprocess.run(
        [sys.executable, "-m", "sandbox_tools.guest.main", "--envd-port", str(ports[0])],
        capture_output=True,
        timeout=30,
        check=False,
    )

    assert second.returncode != 0
    assert b"Address already in use" in second.stderr


def _wait_for(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            assert client.get("/health").json() == "OK"
            return
        time.sleep(0.05)
    pytest.fail("the guest did not come up in 30 s")
