"""The machine's own apt sources, read and used without touching the system."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sandbox_tools.engine.building.apt import Source, base_source, debian_sources, run, unpack
from sandbox_tools.engine.building.install import install_runsc
from sandbox_tools.errors import ConfigError, EngineError

needs_apt = pytest.mark.skipif(not shutil.which("apt-get"), reason="this machine has no apt")


def source(codename: str, *version: int) -> Source:
    return Source(uri="file:/archive", codename=codename, version=version)


def test_the_newest_release_is_taken_where_the_machine_is_not_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "other", "VERSION_CODENAME": "bookworm"})
    sources = [
        source("bookworm", 12, 15),
        source("trixie", 13, 2),
        source("trixie-security", 13),
        source("bullseye", 11),
    ]

    assert base_source(sources).codename == "trixie"


def test_a_debian_machine_builds_from_its_own_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"})

    assert base_source([source("trixie", 13), source("bookworm", 12)]).codename == "bookworm"


def test_sources_without_a_release_are_said_in_words() -> None:
    with pytest.raises(ConfigError, match="bookworm-security"):
        base_source([source("bookworm-security", 12)])


def test_a_failing_command_carries_its_exit_code_and_its_last_words() -> None:
    with pytest.raises(EngineError, match="the reason") as caught:
        run(["sh", "-c", "echo the reason >&2; exit 3"])

    assert caught.value.exit_code == 3
    assert caught.value.argv[0] == "sh"


def test_a_missing_command_is_named() -> None:
    with pytest.raises(ConfigError, match="no-such-command"):
        run(["no-such-command"])


@needs_apt
def test_the_sources_of_this_machine_name_a_release(tmp_path: Path) -> None:
    assert base_source(debian_sources(tmp_path)).uri


@needs_apt
def test_sources_are_found_where_the_machine_never_fetched_its_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh container image has no lists: they are fetched into the scratch directory, the system's stay absent."""
    empty = tmp_path / "system-lists"
    (empty / "partial").mkdir(parents=True)
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::State::lists "{empty}";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))

    found = debian_sources(tmp_path / "scratch")

    assert base_source(found).uri
    assert [path.name for path in empty.iterdir() if path.name != "lock"] == ["partial"]


@needs_apt
def test_a_package_is_unpacked_without_being_installed(tmp_path: Path) -> None:
    base = base_source(debian_sources(tmp_path / "lists"))

    files = unpack("hello", [base.line()], tmp_path / "hello")

    assert "Hello" in run([files / "usr/bin/hello"])


@needs_apt
def test_runsc_comes_from_the_sources_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing but the binary is left in the state directory."""
    monkeypatch.delenv("SANDBOX_TOOLS_RUNSC", raising=False)
    if shutil.which("runsc"):
        pytest.skip("this machine has a runsc on PATH, which is taken instead")

    runsc = install_runsc(tmp_path)

    assert runsc.path == tmp_path / "bin/runsc"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["runsc"]
