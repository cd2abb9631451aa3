"""What a sandbox may take at most, and that it lives on when it asks for more."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.engine.bounds import (
    DEFAULT_DISK_MB,
    Bounds,
    file_limit,
    least_disk_mb,
    limit_files,
    most_processes,
    size_in_force,
)
from sandbox_tools.engine.bundle import bundle_config, write_bundle
from tests.conftest import running_engine
from tests.engine.attempts import Attempts
from tests.machine import Box, EngineProcess

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's engine has no control groups")

GIB = 1 << 30

LEAST = 8 * GIB
"""What `--disk-mb 1` comes to beside 2 GB of memory."""


def config(memory_mb: int = 2048) -> dict[str, object]:
    return bundle_config(root=Path("/"), guest=Path("/"), memory_mb=memory_mb, cgroup=None)


@pytest.fixture(scope="module")
def narrow(templates: Path) -> Iterator[EngineProcess]:
    """An engine whose sandboxes may write as little as can be asked for, and have one core."""
    options = ("--disk-mb", "1") + (("--cpus", "1") if os.geteuid() == 0 else ())
    with running_engine(*options) as engine:
        yield engine


@pytest.fixture
def box(narrow: EngineProcess) -> Iterator[Box]:
    box = narrow.create()
    yield box
    box.kill()


def pid_of(box: Box) -> int:
    """The sandbox's process on the host."""
    return int(next((box.engine.state / "sandboxes" / box.id).glob("run-*/pid")).read_text())


def test_a_write_beyond_the_disk_limit_fails_and_the_sandbox_lives_and_is_paused(box: Box) -> None:
    attempts = Attempts(box)
    box.run("kept = 'yes'")

    said = attempts.run(
        f"fallocate -l {LEAST - GIB} /home/user/most && dd if=/dev/zero of=/home/user/big bs=1M count=1100"
    )

    assert "File too large" in said
    assert "0 bytes" not in said
    assert box.value("kept") == "yes"
    assert attempts.run("rm /home/user/big; echo fits >/home/user/small; cat /home/user/small") == "fits"
    assert box.post("pause").status_code == 204
    assert box.post("connect", timeout=600).status_code == 201
    assert resource.prlimit(pid_of(box), resource.RLIMIT_FSIZE)[0] == LEAST


def test_the_limit_is_back_when_a_checkpoint_has_been_written(box: Box) -> None:
    with box.engine.http() as http:
        taken = http.post(f"/sandboxes/{box.id}/snapshots", json={})
        assert taken.status_code == 201, taken.text
        assert http.delete(f"/templates/{taken.json()['snapshotID']}").status_code == 204

    assert resource.prlimit(pid_of(box), resource.RLIMIT_FSIZE)[0] == LEAST


def test_what_lies_in_memory_has_a_size_too_so_that_filling_it_ends_nothing(box: Box) -> None:
    attempts = Attempts(box)

    for path, least in (("/tmp/big", 1000 << 20), ("/dev/shm/big", 500 << 20)):
        said = attempts.run(f"dd if=/dev/zero of={path} bs=1M count=3000; stat -c %s {path}; rm {path}")

        assert "No space left" in said, said
        assert int(said.splitlines()[-1]) >= least
    assert box.value("1 + 1") == "2"


def test_many_small_files_take_none_of_the_hosts(box: Box) -> None:
    """Inodes run out on a host whose sandboxes have files of their own there; gVisor keeps all in one."""
    before = os.statvfs(box.engine.state).f_ffree

    made = box.value(
        "import os\nfor n in range(5000): open(f'/home/user/{n}', 'w')\nlen(os.listdir('/home/user')) >= 5000"
    )

    assert made == "True"
    assert before - os.statvfs(box.engine.state).f_ffree < 2500


def test_a_fork_bomb_is_refused_more_processes_and_neither_its_sandbox_nor_another_dies(narrow: EngineProcess) -> None:
    box, other = narrow.create(), narrow.create()
    bomb = """
import os, sys, time
children = []
try:
    while len(children) < 3000:
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        children.append(child)
except OSError as error:
    print(type(error).__name__, len(children))
for child in children:
    os.kill(child, 9)
"""
    on_host = len([each for each in os.listdir("/proc") if each.isdigit()])

    said = Attempts(box).run(f"python3 -c '{bomb}'").split()

    assert said[0] == "BlockingIOError"
    assert 100 < int(said[1]) < most_processes(2048)
    assert len([each for each in os.listdir("/proc") if each.isdigit()]) - on_host < 1500
    assert box.value("1 + 1") == other.value("1 + 1") == "2"
    box.kill()
    other.kill()


@pytest.mark.parametrize("user", ["user", "root"])
def test_open_files_run_out_at_a_number_that_is_not_the_hosts(box: Box, user: str) -> None:
    code = "[os.open('/etc/passwd', os.O_RDONLY) for _ in range(9000)]"
    raised = "__import__('resource').setrlimit(7, (1 << 20, 1 << 20))"

    told = Attempts(box).told(raised, code, user=user)

    assert told[code] == "EMFILE"
    assert told[raised] == "ValueError"  # Python's, for `EPERM`
    assert box.value("1 + 1") == "2"


@as_root
def test_a_share_of_the_cpu_is_not_exceeded(box: Box) -> None:
    """One core for two busy processes, by the host's clock of CPU time."""
    from sandbox_tools.engine.usage import cpu_seconds

    box.run("import subprocess, sys; busy = [subprocess.Popen([sys.executable, '-c', 'while 1: pass']) for _ in '12']")
    pid, began, before = pid_of(box), time.monotonic(), cpu_seconds(pid_of(box))
    time.sleep(4)
    used, seconds = cpu_seconds(pid) - before, time.monotonic() - began

    assert 0 < used < 1.4 * seconds


@given(disk_mb=st.integers(1, 1 << 24), memory_mb=st.integers(64, 1 << 18))
def test_the_file_limit_never_starves_what_it_is_not_meant_for(disk_mb: int, memory_mb: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_bundle(Path(directory), Bounds(disk_mb=disk_mb).applied(config(memory_mb)))
        limit = file_limit(Path(directory))

    assert limit is not None
    assert 0 <= limit - (max(disk_mb, least_disk_mb(memory_mb)) << 20) < GIB
    assert limit >= (memory_mb << 20) + GIB
    assert limit % GIB == 0


@given(engine=st.none() | st.integers(0, 1 << 24), template=st.none() | st.integers(1, 1 << 24))
def test_of_the_engines_and_the_templates_disk_the_narrower_counts(engine: int | None, template: int | None) -> None:
    own = bundle_config(root=Path("/"), guest=Path("/"), memory_mb=2048, cgroup=None, disk_mb=template)
    with tempfile.TemporaryDirectory() as directory:
        write_bundle(Path(directory), Bounds(disk_mb=engine).applied(own))
        limit = file_limit(Path(directory))

    said = [each for each in (engine, template) if each]
    if said:
        assert limit == size_in_force(min(said), 2048) << 20
    else:
        assert limit == (None if engine == 0 else DEFAULT_DISK_MB << 20)


def test_no_limit_is_none_and_a_bundle_of_an_earlier_release_has_none(tmp_path: Path) -> None:
    write_bundle(tmp_path / "none", Bounds(disk_mb=0).applied(config()))
    write_bundle(tmp_path / "earlier", config())

    assert file_limit(tmp_path / "none") is file_limit(tmp_path / "earlier") is None


def test_the_narrower_share_of_the_cpu_counts() -> None:
    wide = config()
    linux = wide["linux"]
    assert isinstance(linux, dict)
    linux["resources"]["cpu"] = {"quota": 100_000, "period": 100_000}

    def quota(cpus: float | None) -> int:
        number: int = Bounds(cpus=cpus).applied(wide)["linux"]["resources"]["cpu"]["quota"]
        return number

    assert [quota(None), quota(4), quota(0.5)] == [100_000, 100_000, 50_000]


def test_a_process_that_is_gone_is_no_error() -> None:
    limit_files(2**22 + 1, None)
