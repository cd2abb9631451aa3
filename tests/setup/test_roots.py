"""Root file systems, built for real with mmdebstrap and pip."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import stat
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from sandbox_tools.engine.building.apt import debian_sources, run
from sandbox_tools.engine.building.roots import build_root, find_root, remove_tree
from sandbox_tools.errors import ConfigError, EngineError

pytestmark = pytest.mark.skipif(not shutil.which("apt-get"), reason="this machine has no apt to build from")


def build(templates_dir: Path) -> tuple[Path, list[str]]:
    steps: list[str] = []
    return build_root(templates_dir, lambda words, share: steps.append(words)), steps


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Path, list[str]]]]:
    """What two processes get that build in one directory at once, in which a third died before."""
    templates_dir = tmp_path_factory.mktemp("templates")
    left = templates_dir / "roots/.partial-died/root/closed"
    left.mkdir(parents=True)
    (left / "file").write_text("half")
    left.chmod(0o500)

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        outcomes = [done.result() for done in [pool.submit(build, templates_dir) for _ in range(2)]]
    return templates_dir, outcomes


@pytest.fixture
def root(built: tuple[Path, list[tuple[Path, list[str]]]]) -> Path:
    return built[1][0][0]


def test_two_builders_at_once_build_one_root(built: tuple[Path, list[tuple[Path, list[str]]]]) -> None:
    templates_dir, [(first, first_steps), (second, second_steps)] = built

    assert first == second == find_root(templates_dir)
    assert (first_steps + second_steps).count("Installing Debian packages") == 1


def test_nothing_is_left_beside_it_not_even_of_a_builder_that_died(
    built: tuple[Path, list[tuple[Path, list[str]]]],
) -> None:
    templates_dir, [(root, _), _] = built

    assert sorted(path.name for path in (templates_dir / "roots").iterdir()) == [".lock", root.name]


def test_a_root_that_is_there_is_not_built_again(built: tuple[Path, list[tuple[Path, list[str]]]], root: Path) -> None:
    templates_dir, _ = built
    before = root.stat()

    assert build(templates_dir) == (root, [])
    assert root.stat() == before


def test_a_root_holds_nothing_of_the_host(root: Path, tmp_path: Path) -> None:
    """Neither its name, its resolver, its mirrors (whose addresses may hold passwords), nor the path of its Python."""
    assert (root / "etc/hostname").read_text() == "sandbox\n"
    assert not (root / "etc/resolv.conf").exists()
    assert not list((root / "dev").iterdir())
    assert not list((root / "usr/local/lib").glob("python3.*/dist-packages/bin"))

    settings = [path for path in (root / "etc/apt").rglob("*") if path.is_file() and path.suffix != ".asc"]
    text = "".join(path.read_text(errors="replace") for path in settings)
    assert not [source.uri for source in debian_sources(tmp_path) if source.uri in text]


def test_no_program_in_it_runs_with_the_rights_of_its_owner(root: Path) -> None:
    """The tree is also visible on the host, where old setuid programs would be a way in."""
    privileged = stat.S_ISUID | stat.S_ISGID
    programs = [path for path in (root / "usr").rglob("*") if path.is_file() and not path.is_symlink()]

    assert programs
    assert not [path for path in programs if path.stat().st_mode & privileged]


def test_what_the_guest_needs_is_there_and_compiled(root: Path) -> None:
    [packages] = (root / "usr/local/lib").glob("python3.*/dist-packages")

    for name in ("ipykernel", "jupyter_client", "numpy", "pandas", "matplotlib", "starlette", "uvicorn", "httptools"):
        assert list((packages / name / "__pycache__").glob("__init__.*.pyc")), name
    assert (root / "usr/bin/tini").exists()
    assert (root / "home/user").is_dir()
    assert "user:x:1000:1000:" in (root / "etc/passwd").read_text()


def test_the_guests_packages_load_in_the_root(root: Path) -> None:
    """Their wheels were chosen for the root's Python and C library, and nothing they depend on is missing."""
    enter = ["unshare", "--user", "--map-root-user", "chroot", root]
    code = (
        "import ipykernel.kernelapp, jupyter_client, matplotlib.pyplot, pandas, starlette, uvicorn, httptools; print(7)"
    )

    assert run([*enter, "/usr/bin/env", "-i", "MPLCONFIGDIR=/nowhere", "/usr/bin/python3", "-IBc", code]) == "7\n"


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "bin/mmdebstrap"
    failing.parent.mkdir()
    failing.write_text("#!/bin/sh\necho 'E: the archive is closed' >&2\nexit 25\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing.parent}:/usr/bin:/bin")

    with pytest.raises(EngineError, match="the archive is closed"):
        build(tmp_path / "templates")

    assert [path.name for path in (tmp_path / "templates/roots").iterdir()] == [".lock"]


def test_a_release_that_the_sources_do_not_name_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": "nosuch"})

    with pytest.raises(ConfigError, match="nosuch"):
        build(tmp_path)


def test_another_architecture_has_a_root_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """Templates may lie on a disk that several machines share."""
    monkeypatch.setattr(platform, "machine", lambda: "another")

    assert find_root(root.parents[1]) is None


def test_a_tree_with_closed_directories_can_be_removed(tmp_path: Path) -> None:
    closed = tmp_path / "tree/closed"
    closed.mkdir(parents=True)
    (closed / "file").write_text("")
    closed.chmod(0o500)

    remove_tree(tmp_path / "tree")

    assert not (tmp_path / "tree").exists()


@pytest.mark.soak
def test_a_root_with_more_packages_is_another_one(tmp_path: Path) -> None:
    """A minute: it is built from the beginning."""
    root = build_root(tmp_path, lambda words, share: None, ("jq", "bash"))

    assert run(["chroot", root, "/usr/bin/jq", "--version"] if os.geteuid() == 0 else ["ls", root / "usr/bin/jq"])
    assert find_root(tmp_path) is None
