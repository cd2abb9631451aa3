"""What code in a sandbox can't see or reach; the README promises it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import Box, EngineProcess


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


def test_no_file_of_the_host_is_there(box: Box, tmp_path: Path) -> None:
    for path in (tmp_path, box.engine.state, Path(__file__), Path.home() / ".local"):
        assert box.value(f"__import__('os').path.exists({str(path)!r})") == "False"
    assert socket.gethostname() not in box.value("open('/etc/hostname').read() + __import__('socket').gethostname()")


def test_no_process_of_the_host_is_there(box: Box) -> None:
    pids = eval(box.value("sorted(int(pid) for pid in __import__('os').listdir('/proc') if pid.isdigit())"))
    assert len(pids) < 20
    assert os.getpid() not in pids or os.getpid() < 20


def test_the_only_network_is_its_own_loopback(box: Box) -> None:
    assert "eth" not in box.value("open('/proc/net/dev').read()")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = f"""
import socket
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 2)
    reached = "the host"
except OSError as error:
    reached = "nobody"
reached
"""
        assert box.value(reached) == "nobody"


def test_two_sandboxes_do_not_share_files_or_ports(engine: EngineProcess, box: Box) -> None:
    other = engine.create()
    box.run("import socket; mine = socket.create_server(('127.0.0.1', 4444)); open('/tmp/mine', 'w').write('x')")

    assert other.value("__import__('os').path.exists('/tmp/mine')") == "False"
    assert other.value("__import__('socket').socket().connect_ex(('127.0.0.1', 4444)) != 0") == "True"
    other.kill()


def test_user_code_is_not_root_and_cannot_end_the_guest(box: Box) -> None:
    assert box.value("__import__('os').getuid()") == "1000"
    assert "PermissionError" in str(box.run("import os; os.kill(2, 9)"))
