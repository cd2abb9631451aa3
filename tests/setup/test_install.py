"""Finding, checking and fetching `runsc`."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sandbox_tools.engine.building.install import (
    MINIMUM_VERSION,
    check_machine,
    find_runsc,
    install_runsc,
    make_directory,
)
from sandbox_tools.errors import ConfigError


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _no_runsc_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SANDBOX_TOOLS_RUNSC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("runsc version 0.0~20240729.0", 20240729),
        ("runsc version release-20240729.0", 20240729),
        ("runsc version release-20260105.0-12-gabcdef012345", 20260105),
    ],
)
def test_debian_and_upstream_version_strings_are_understood(tmp_path: Path, says: str, version: int) -> None:
    program(tmp_path / "bin/runsc", says)

    assert find_runsc(tmp_path).version == version


def test_the_environment_comes_before_the_state_directory_and_that_before_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = program(tmp_path / "path/runsc", "runsc version release-20250101.0")
    assert find_runsc(tmp_path).path == on_path

    in_state = program(tmp_path / "bin/runsc", "runsc version release-20250102.0")
    assert find_runsc(tmp_path).path == in_state

    chosen = program(tmp_path / "elsewhere", "runsc version release-20250103.0")
    monkeypatch.setenv("SANDBOX_TOOLS_RUNSC", str(chosen))
    assert find_runsc(tmp_path).path == chosen


def test_an_older_one_is_passed_over_for_a_newer_one(tmp_path: Path) -> None:
    """Debian 12's own `runsc` on PATH must not hide the right one, nor the other way round."""
    program(tmp_path / "bin/runsc", "runsc version 0.0~20221219.0")
    newer = program(tmp_path / "path/runsc", "runsc version 0.0~20240729.0")

    assert find_runsc(tmp_path).path == newer


def test_an_older_one_alone_is_refused_with_both_versions(tmp_path: Path) -> None:
    program(tmp_path / "path/runsc", "runsc version 0.0~20221219.0")

    with pytest.raises(ConfigError, match=r"20221219.*20240729"):
        find_runsc(tmp_path)


def test_a_missing_runsc_is_told_in_two_lines(tmp_path: Path) -> None:
    """What to install, and how to do without: a cloud provider's key."""
    with pytest.raises(ConfigError) as caught:
        find_runsc(tmp_path)

    install, instead = caught.value.message.splitlines()
    assert "sandbox-tools setup" in install
    assert str(MINIMUM_VERSION) in install
    assert {"E2B_API_KEY", "PPIO_API_KEY", "UCLOUD_SANDBOX_API_KEY"} <= set(
        instead.replace("`", " ").replace(",", " ").split()
    )


@pytest.mark.parametrize("says", ["runsc version VERSION_MISSING", "something else"])
def test_a_program_without_a_release_date_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    monkeypatch.setenv("SANDBOX_TOOLS_RUNSC", str(program(tmp_path / "runsc", says)))

    with pytest.raises(ConfigError, match="version"):
        find_runsc(tmp_path)


def test_a_chosen_runsc_that_is_not_there_is_an_error_and_nothing_else_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin/runsc", "runsc version 0.0~20240729.0")
    monkeypatch.setenv("SANDBOX_TOOLS_RUNSC", str(tmp_path / "gone"))

    with pytest.raises(ConfigError, match="gone"):
        install_runsc(tmp_path)


def test_a_runsc_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    """PATH holds no apt here: fetching would fail."""
    there = program(tmp_path / "bin/runsc", "runsc version 0.0~20240729.0")

    assert install_runsc(tmp_path).path == there


def test_a_machine_without_apt_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not installed"):
        install_runsc(tmp_path)


def test_forbidden_user_namespaces_are_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = program(tmp_path / "path/unshare", "")
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(ConfigError, match="User namespaces are forbidden") as caught:
        check_machine()

    assert "Operation not permitted" in caught.value.message


def test_another_architecture_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")

    with pytest.raises(ConfigError, match="riscv64"):
        check_machine()


def test_a_state_directory_that_can_not_be_made_is_said_in_words(tmp_path: Path) -> None:
    """A file stands where a directory should be: an error for root as well."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="SANDBOX_TOOLS_STATE_DIR"):
        make_directory(tmp_path / "file/state")


def test_a_state_directory_without_write_permission_is_said_in_words(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")

    closed = tmp_path / "closed"
    closed.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)

    with pytest.raises(ConfigError, match="Permission denied"):
        make_directory(closed)
