"""What the filesystem service tells about a file, directory or link, in the words of envd's `EntryInfo`."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sandbox_tools.guest import metadata

FILE, DIRECTORY, UNSPECIFIED = "FILE_TYPE_FILE", "FILE_TYPE_DIRECTORY", "FILE_TYPE_UNSPECIFIED"

FIRST_SECOND, LAST_SECOND = -62135596800, 253402300799
"""The years 1 to 9999, outside of which there are no timestamps, but there may be files."""


class Names:
    """Users and groups by their numbers, looked up once each; make one for each call, for they may change."""

    def __init__(self) -> None:
        self.user = functools.cache(_user)
        self.group = functools.cache(_group)


def entry(path: Path, names: Names) -> dict[str, Any]:
    """The entry at a path.

    A link is told about itself, except that `type` and `mode` are those of what it leads to in the end.

    Raises:
        OSError: There is none.
    """
    info = os.lstat(path)
    seen: os.stat_result | None = info
    told: dict[str, Any] = {}
    if stat.S_ISLNK(info.st_mode):
        told["symlinkTarget"] = text(os.path.realpath(path))
        try:
            seen = os.stat(path)
        except OSError:
            seen = None

    return {
        "name": text(path.name or "/"),
        "type": UNSPECIFIED if seen is None else _type(seen.st_mode),
        "path": text(path),
        "size": str(info.st_size),
        "mode": 0 if seen is None else seen.st_mode & 0o777,
        "permissions": permissions(info.st_mode),
        "owner": names.user(info.st_uid),
        "group": names.group(info.st_gid),
        "modifiedTime": timestamp(info.st_mtime_ns),
        **told,
        **({"metadata": attached} if (attached := metadata.load(path)) else {}),
    }


def permissions(mode: int) -> str:
    """A mode as Go's `FileMode.String` writes it: `-rw-r--r--`, `dtrwxrwxrwx`, `Lrwxrwxrwx`, `Dcrw-rw-rw-`."""
    kinds = (
        ("d", stat.S_ISDIR(mode)),
        ("L", stat.S_ISLNK(mode)),
        ("D", stat.S_ISBLK(mode) or stat.S_ISCHR(mode)),
        ("p", stat.S_ISFIFO(mode)),
        ("S", stat.S_ISSOCK(mode)),
        ("u", mode & stat.S_ISUID),
        ("g", mode & stat.S_ISGID),
        ("c", stat.S_ISCHR(mode)),
        ("t", mode & stat.S_ISVTX),
    )
    letters = "".join(letter for letter, is_so in kinds if is_so) or "-"
    bits = "".join(letter if mode & 1 << 8 - at else "-" for at, letter in enumerate("rwxrwxrwx"))
    return letters + bits


def timestamp(nanoseconds: int) -> str:
    """A moment since 1970 as RFC 3339, in UTC."""
    seconds, rest = divmod(nanoseconds, 10**9)
    if not FIRST_SECOND <= seconds <= LAST_SECOND:
        seconds, rest = min(max(seconds, FIRST_SECOND), LAST_SECOND), 0
    moment = datetime(1970, 1, 1) + timedelta(seconds=seconds)
    fraction = f".{rest:09d}" if rest else ""
    return f"{moment.isoformat()}{fraction}Z"


def text(path: Path | str) -> str:
    """A name as text that can be sent, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")


def _type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return DIRECTORY
    return FILE if stat.S_ISREG(mode) else UNSPECIFIED


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
