"""What not even root in a sandbox may do: its kernel is gVisor's own, and the host's is out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.attempts import Attempts
from tests.engine.test_isolation import USERS
from tests.machine import Box, EngineProcess

# Numbers of system calls and flags on x86_64 (linux/asm/unistd_64.h, linux/sched.h).
PTRACE, INIT_MODULE, KEXEC_LOAD, BPF, SETNS, REBOOT, IOPL = 101, 175, 246, 321, 308, 169, 172
NAMESPACES = {"user": 0x10000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x20000, "uts": 0x4000000}


@pytest.fixture(scope="module")
def box(engine: EngineProcess) -> Iterator[Box]:
    box = engine.create()
    yield box
    box.kill()


@pytest.fixture(scope="module")
def attempts(box: Box) -> Attempts:
    return Attempts(box)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    ("code", "errors"),
    [
        ("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)", {"EPERM"}),
        ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)", {"EPERM"}),
        ("socket.socket(40, socket.SOCK_STREAM)", {"EAFNOSUPPORT"}),  # AF_VSOCK: to the host of a virtual machine
        ("__import__('fcntl').ioctl(open('/dev/net/tun', 'rb'), 0x400454CA, b'tun0' + bytes(36))", {"EPERM"}),
        ("libc_call('mount', b'none', b'/mnt', b'tmpfs', 0, None)", {"EPERM"}),
        ("libc_call('mount', b'none', b'/mnt', b'proc', 0, None)", {"EPERM"}),
        ("libc_call('mount', b'/', b'/mnt', None, 4096, None)", {"EPERM"}),
        ("libc_call('umount2', b'/opt/sandbox-tools', 2)", {"EPERM"}),
        (f"call({INIT_MODULE}, 0, 0, b'')", {"EPERM"}),
        (f"call({KEXEC_LOAD}, 0, 0, 0, 0)", {"EPERM"}),
        (f"call({BPF}, 0, 0, 0)", {"EPERM"}),
        (f"call({IOPL}, 3)", {"EPERM"}),
        (f"call({REBOOT}, 0xfee1dead, 672274793, 0x1234567, 0)", {"EPERM"}),
        ("open('/dev/kvm', 'rb')", {"ENOENT"}),
        ("open('/dev/mem', 'rb')", {"ENOENT"}),
        ("open('/proc/kcore', 'rb')", {"ENOENT"}),
        ("open('/sys/kernel/mm/transparent_hugepage/enabled', 'w')", {"ENOENT", "EACCES", "EROFS"}),
        ("open('/sys/escape', 'w')", {"EACCES", "EROFS"}),
        ("open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')", {"EACCES", "EPERM", "ENOENT"}),
        ("os.open('/proc/1/mem', os.O_RDWR)", {"EACCES"}),
    ],
)
def test_it_is_refused(attempts: Attempts, code: str, errors: set[str], user: str) -> None:
    assert attempts.told(code, user=user)[code] in errors


@pytest.mark.parametrize("user", USERS)
def test_a_device_that_can_be_named_cannot_be_opened(attempts: Attempts, user: str) -> None:
    """gVisor makes the node and has no driver behind it: the host's kernel is never asked."""
    nodes = {"kvm": (0o20666, 10, 232), "mem": (0o20666, 1, 1), "disk": (0o60666, 8, 0), "kmsg": (0o20666, 1, 11)}
    codes = [
        f"[os.mknod('/tmp/{name}-{user}', {mode}, os.makedev({major}, {minor})), open('/tmp/{name}-{user}', 'rb')]"
        for name, (mode, major, minor) in nodes.items()
    ]

    assert set(attempts.told(*codes, user=user).values()) <= {"ENXIO", "EPERM", "ENODEV"}


@pytest.mark.parametrize("user", USERS)
def test_no_other_namespace_is_entered(attempts: Attempts, user: str) -> None:
    """A user namespace may be made, as gVisor's gives power over nothing but what is made in it."""
    for name, flag in NAMESPACES.items():
        codes = (f"call({SETNS}, os.open('/proc/1/ns/{name}', os.O_RDONLY), 0)", f"libc_call('unshare', {flag})")
        entered, made = attempts.told(*codes, user=user).values()

        assert entered in {"EPERM", "EINVAL", "ENOENT", "EACCES"}, name
        assert made == ("None" if name == "user" else "EPERM"), name


def test_in_a_user_namespace_of_its_own_code_has_no_power_over_the_sandboxes_files(attempts: Attempts) -> None:
    """All capabilities are held there (capabilities(7)), and none of them counts outside."""
    into = "libc_call('unshare', 0x10000000)"
    codes = [
        f"[{into}, open('/etc/shadow').read()]",
        f"[{into}, os.kill(2, 9)]",
        f"[{into}, os.mkdir('/opt/sandbox-tools/x')]",
        f"[{into}, socket.sethostname('other')]",
        f"[{into}, libc_call('mount', b'none', b'/etc', b'tmpfs', 0, None)]",
    ]

    told = [next(iter(attempts.told(code).values())) for code in codes]

    assert set(told) <= {"EPERM", "EACCES", "EROFS"}, told


def test_a_raw_socket_of_a_user_namespace_leads_no_further_than_loopback(attempts: Attempts) -> None:
    """This `runsc` grants one there, which Linux would not: a sandbox's code can hear its own sandbox's loopback."""
    raw = "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)"
    bound = f"[libc_call('unshare', 0x10000000), {raw}.bind(('lo', 0)), socket.if_nameindex()]"

    assert attempts.told(bound)[bound] in ("[None, None, [(1, 'lo')]]", "EPERM")


def test_user_code_can_neither_trace_nor_signal_what_is_not_its_own(attempts: Attempts) -> None:
    """1 is init and 2 the guest; 101 with 16 is `PTRACE_ATTACH`."""
    codes = [f"call({PTRACE}, 16, {pid}, 0, 0)" for pid in (1, 2)] + [f"os.kill({pid}, 9)" for pid in (1, 2)]

    assert set(attempts.told(*codes).values()) == {"EPERM"}


def test_what_root_writes_to_the_kernels_settings_stays_in_its_sandbox(attempts: Attempts) -> None:
    """They are gVisor's own, and few; `sysrq-trigger` would restart a machine."""
    settings = ("net/ipv4/ip_forward", "vm/overcommit_memory", "kernel/hostname", "kernel/shmmax")
    before = [Path("/proc/sys", each).read_text() for each in settings]

    codes = [f"open('/proc/sys/{each}', 'w').write('1')" for each in settings]
    told = attempts.told(*codes, "open('/proc/sysrq-trigger', 'w').write('c')", user="root")

    assert set(told.values()) & {"1"}, "none could be written, so that this shows nothing"
    assert [Path("/proc/sys", each).read_text() for each in settings] == before
    assert attempts.run("echo alive") == "alive"


def test_root_that_ends_its_own_sandbox_ends_no_other(engine: EngineProcess, box: Box) -> None:
    """As pulling a machine's plug does: told with a reason, and nobody else's loss."""
    mine = engine.create()

    with pytest.raises(Exception, match="closed"):
        Attempts(mine).run("kill -9 1 2; sleep 60", user="root")

    assert "ended by itself" in mine.wait_gone()
    assert box.value("1 + 1") == "2"
