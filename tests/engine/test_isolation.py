"""What code in a sandbox can't see or reach; the README promises it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_tools.paths import socket_path
from tests.engine.attempts import Attempts
from tests.machine import Box, EngineProcess

USERS = ("user", "root")
"""Whom the commands of a sandbox may run as; its code runs as the first."""


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


@pytest.fixture(scope="module")
def attempts(box: Box) -> Attempts:
    return Attempts(box)


def test_no_file_of_the_host_is_there(box: Box, tmp_path: Path) -> None:
    for path in (tmp_path, box.engine.state, Path(__file__), Path.home() / ".local"):
        assert box.value(f"__import__('os').path.exists({str(path)!r})") == "False"
    assert socket.gethostname() not in box.value("open('/etc/hostname').read() + __import__('socket').gethostname()")


@pytest.mark.parametrize("user", USERS)
def test_no_way_round_leads_to_a_file_of_the_host(attempts: Attempts, tmp_path: Path, user: str) -> None:
    """Through the roots and open files of processes, links, `..` out of each mount, and a root of one's own."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    there = str(secret).lstrip("/")
    up = "../" * 12
    attempts.run(f"ln -sfn /proc/1/root /tmp/root-{user}; ln -sfn {secret} /tmp/link-{user}")
    ways = [
        f"/proc/1/root/{there}",
        f"/proc/self/root/{there}",
        f"/proc/self/cwd/{up}{there}",
        f"/proc/1/cwd/{up}{there}",
        f"/opt/sandbox-tools/{up}{there}",
        f"/dev/shm/{up}{there}",
        f"/proc/self/fd/0/{up}{there}",
        f"/tmp/root-{user}/{there}",
        f"/tmp/link-{user}",
    ]

    told = attempts.told(*(f"open({way!r}).read()" for way in ways), user=user)

    assert set(told.values()) <= {"ENOENT", "EACCES", "ENOTDIR"}, told
    escape = f"[os.chroot('/proc/self'), os.chdir('{up}'), os.path.exists({there!r})][-1]"
    assert attempts.told(escape, user=user)[escape] == ("EPERM" if user == "user" else "False")


@pytest.mark.parametrize("user", USERS)
def test_the_guests_own_code_and_the_engines_files_are_out_of_reach(
    attempts: Attempts, engine: EngineProcess, user: str
) -> None:
    """The state directory holds the sockets, the snapshots and, on TCP, the keys."""
    assert (engine.state / "sandboxes").is_dir()
    state, sock = str(engine.state), str(socket_path(engine.state))
    written = "open('/opt/sandbox-tools/sandbox_tools/guest/main.py', 'a')"
    told = attempts.told(
        f"os.listdir({state!r})",
        f"socket.socket(socket.AF_UNIX).connect({sock!r})",
        f"socket.socket(socket.AF_UNIX).connect('/proc/1/root{sock}')",
        written,
        user=user,
    )

    assert told.pop(written) == ("EACCES" if user == "user" else "EROFS")
    assert set(told.values()) <= {"ENOENT", "EACCES"}, told


def test_the_tunnel_to_the_engine_is_not_open_to_user_code(attempts: Attempts) -> None:
    """The guest's standard files and what it has made of them lead to the engine."""
    opened = "[os.open(f'/proc/{pid}/fd/{fd}', os.O_RDWR | os.O_NONBLOCK) for pid in (1, 2) for fd in (%d,)]"
    codes = [opened.replace("%d", str(fd)).replace("(1, 2)", pid) for pid, fd in (("(1,)", 0), ("(1,)", 1))]
    codes += [opened.replace("%d", str(fd)).replace("(1, 2)", "(2,)") for fd in (3, 4)]

    assert set(attempts.told(*codes).values()) == {"EACCES"}


def test_no_process_of_the_host_is_there(box: Box) -> None:
    pids = eval(box.value("sorted(int(pid) for pid in __import__('os').listdir('/proc') if pid.isdigit())"))
    assert len(pids) < 20
    assert os.getpid() not in pids or os.getpid() < 20


def test_the_only_network_is_its_own_loopback(attempts: Attempts) -> None:
    assert attempts.told("socket.if_nameindex()")["socket.if_nameindex()"] == "[(1, 'lo')]"


def own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has loopback only")
        address: str = probe.getsockname()[0]
    return address


@pytest.mark.parametrize("user", USERS)
def test_a_service_of_the_host_is_out_of_reach_at_each_of_its_addresses(attempts: Attempts, user: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        callers: list[str] = []

        def accept() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                callers.append(caller[0])
                connection.close()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            addresses = ["127.0.0.1", own_address()]
            for address in addresses:
                socket.create_connection((address, port), 5).close()  # it is there, for who may reach it
            codes = [f"socket.create_connection(({each!r}, {port}), 2)" for each in addresses]
            told = attempts.told(*codes, user=user)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            accepting.join(5)

    assert list(told.values()) == ["ECONNREFUSED", "EHOSTUNREACH"]
    assert len(callers) == len(addresses)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fd00:ec2::254",
        "10.0.0.1",
        "172.17.0.1",
        "192.168.0.1",
        "100.100.100.200",
        "fe80::1",
        "1.1.1.1",
    ],
)
def test_no_address_is_reached(attempts: Attempts, address: str, user: str) -> None:
    """Cloud metadata above all (AWS, GCP and Azure: the first two; Alibaba: 100.100.100.200)."""
    family = "AF_INET6" if ":" in address else "AF_INET"
    tcp = f"socket.socket(socket.{family}).connect(({address!r}, 80))"
    udp = f"socket.socket(socket.{family}, socket.SOCK_DGRAM).sendto(b'x', ({address!r}, 53))"

    assert set(attempts.told(tcp, udp, user=user).values()) <= {"EHOSTUNREACH", "ENETUNREACH"}


def test_two_sandboxes_do_not_share_files_or_ports(engine: EngineProcess, box: Box) -> None:
    other = engine.create()
    box.run("import socket; mine = socket.create_server(('127.0.0.1', 4444)); open('/tmp/mine', 'w').write('x')")
    box.run("open('/dev/shm/mine', 'w').write('x'); open('/home/user/mine', 'w').write('x')")
    box.run("abstract = socket.socket(socket.AF_UNIX); abstract.bind('\\0mine'); abstract.listen()")

    for path in ("/tmp/mine", "/dev/shm/mine", "/home/user/mine"):
        assert other.value(f"__import__('os').path.exists({path!r})") == "False"
    told = Attempts(other).told(
        "socket.create_connection(('127.0.0.1', 4444), 2)", "socket.socket(socket.AF_UNIX).connect('\\0mine')"
    )
    assert set(told.values()) == {"ECONNREFUSED"}
    other.kill()


def test_user_code_is_not_root_and_cannot_end_the_guest(box: Box) -> None:
    assert box.value("__import__('os').getuid()") == "1000"
    assert "PermissionError" in str(box.run("import os; os.kill(2, 9)"))
