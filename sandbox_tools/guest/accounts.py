"""Who a request acts as: the users of the sandbox's own `/etc/passwd`, and the paths that they name."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

USER = "user"
"""Who a request acts as that names nobody, where there is such a user and the guest may become it."""

ROOT = "root"

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class UnknownUserError(LookupError):
    """Raised when the sandbox has no such user; the text names it."""


class BadPathError(ValueError):
    """Raised for a path that no file can have; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Who the user's code runs as, and whose its files are."""

    name: str
    home: Path
    uid: int | None = None
    """None: as the guest itself, whoever that is."""
    gid: int | None = None
    groups: tuple[int, ...] = ()
    """All groups by their ids, `gid` among them; empty where `uid` is None."""

    def environment(self) -> dict[str, str]:
        """What a login gives, and a matplotlib that draws into results."""
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": f"{self.home}/.local/bin:{PATH}" if self.uid is not None else os.environ.get("PATH", PATH),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }

    def own(self, path: Path | int) -> None:
        """Hands a file or directory, by its path or descriptor, over to this account."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)


_Version = tuple[tuple[int, int, int], ...]

_known: dict[str, tuple[_Version, Account]] = {}
"""Who has been looked up, and in which version of the files: to read them takes a millisecond of every call."""

_lasting = {ROOT: Account(name=ROOT, home=Path("/root"), uid=0, gid=0, groups=(0,))}
"""`root` and `user` as last seen: whatever code does to `/etc/passwd`, a sandbox can still be put right."""


def account(name: str | None = None) -> Account:
    """The account of that name, as the sandbox knows it now.

    Args:
        name: None or empty: `user`; or whoever runs this process, where it is not root or there is no such user.

    Raises:
        UnknownUserError: There is no such user.
    """
    if not name:
        try:
            return _own() if os.geteuid() != 0 else account(USER)
        except UnknownUserError:
            return _own()

    version = _version()
    if name in _known and _known[name][0] == version:
        return _known[name][1]

    try:
        found = _of(pwd.getpwnam(name))
    except (KeyError, ValueError):  # ValueError: no name can be so, with a NUL in it for instance
        if name in _lasting:
            return _lasting[name]

        msg = f"error looking up user {name!r}: there is no such user in the sandbox. Leave it out for {USER!r}."
        raise UnknownUserError(msg) from None

    if version:
        _known[name] = version, found
    if name in (USER, ROOT):
        _lasting[name] = found
    return found


def resolve(path: str, account: Account) -> Path:
    """The absolute path that is meant: relative ones and `~` begin at the account's home, as does nothing at all.

    It is normalised by its text alone: `a/../b` is `b`, whatever `a` links to.

    Raises:
        BadPathError: No file can be called so.
    """
    try:
        if b"\0" in os.fsencode(path):
            msg = f"path {path!r} has a NUL in it. Leave it out."
            raise BadPathError(msg)
    except UnicodeEncodeError:
        msg = f"path {path!r} cannot be encoded as UTF-8. Name it otherwise."
        raise BadPathError(msg) from None

    first, _, rest = path.partition("/")
    if first == "~":
        path = rest.lstrip("/")
    elif first.startswith("~"):
        msg = f"path {path!r} begins with another user's home, which is not looked up. Give an absolute path."
        raise BadPathError(msg)

    whole = os.path.normpath(account.home / path)
    # POSIX lets exactly two slashes at the beginning stand for something else; Linux does not.
    return Path("/" + whole.lstrip("/"))


def _version() -> _Version:
    """Of the files that accounts are read from; empty where one is missing."""
    try:
        files = [os.stat(path) for path in ("/etc/passwd", "/etc/group")]
    except OSError:
        return ()
    return tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)


def _own() -> Account:
    me = pwd.getpwuid(os.geteuid())
    return Account(name=me.pw_name, home=Path(me.pw_dir))


def _of(entry: pwd.struct_passwd) -> Account:
    if os.geteuid() != 0 and entry.pw_uid == os.geteuid():
        return _own()

    return Account(
        name=entry.pw_name,
        home=Path(entry.pw_dir),
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        groups=tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)),
    )
