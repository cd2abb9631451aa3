"""Users and paths as a request names them."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.guest.accounts import Account, BadPathError, UnknownUserError, account, resolve

SOMEBODY = Account(name="somebody", home=Path("/home/somebody"))


@pytest.mark.parametrize("name", ["nobody-of-this-name", "nul\0", "a/b", "\ud800", "x" * 5000, "0"])
def test_a_user_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownUserError, match="no such user"):
        account(name)


@pytest.mark.parametrize("name", [None, ""])
def test_who_names_nobody_is_whoever_can_be_had(name: str | None) -> None:
    """In a sandbox `user`; elsewhere, where there is none or we may not become it, the process's own account."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    expected = "user" if os.geteuid() == 0 and "user" in names else pwd.getpwuid(os.geteuid()).pw_name

    assert account(name).name == expected


def test_root_is_a_user_like_any_other() -> None:
    root = account("root")

    assert (root.name, root.home) == ("root", Path(pwd.getpwnam("root").pw_dir))
    if os.geteuid() == 0:
        assert (root.uid, root.gid) == (0, 0)
        assert 0 in root.groups


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "/home/somebody"),
        ("~", "/home/somebody"),
        ("~/", "/home/somebody"),
        ("~//etc", "/home/somebody/etc"),
        ("a/b", "/home/somebody/a/b"),
        ("./a//b/", "/home/somebody/a/b"),
        ("a/~", "/home/somebody/a/~"),
        ("/etc/hosts", "/etc/hosts"),
        ("//etc/hosts", "/etc/hosts"),
        ("///etc", "/etc"),
        ("../x", "/home/x"),
        ("/../../x", "/x"),
        ("/", "/"),
        ("//", "/"),
    ],
)
def test_paths_begin_at_home_unless_they_are_absolute(path: str, expected: str) -> None:
    assert resolve(path, SOMEBODY) == Path(expected)


@pytest.mark.parametrize("path", ["a\0b", "\0", "\ud800", "~other/x"])
def test_a_path_that_no_file_can_have_is_refused(path: str) -> None:
    with pytest.raises(BadPathError, match="path"):
        resolve(path, SOMEBODY)


@given(st.text(alphabet=st.one_of(st.sampled_from("/.~a\0"), st.characters())))
def test_any_text_is_an_absolute_path_without_steps_back_or_is_refused(path: str) -> None:
    try:
        found = resolve(path, SOMEBODY)
    except BadPathError:
        return

    assert found.is_absolute()
    assert ".." not in found.parts
    assert str(found) == os.path.normpath(found)
    assert found == resolve(str(found), SOMEBODY)
