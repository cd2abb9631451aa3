"""What the operating system's errors mean to a caller: one table for the HTTP routes and the RPC."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why something could not be done."""

    status: int
    """Of an HTTP answer."""
    code: str
    """Of an RPC's answer, as in Connect."""
    message: str


_TABLE: dict[int, tuple[int, str, str]] = {
    errno.ENOENT: (404, "not_found", "path {} does not exist"),
    errno.ENOTDIR: (400, "invalid_argument", "path {} leads through something that is not a directory"),
    errno.EISDIR: (400, "invalid_argument", "path {} is a directory"),
    errno.EEXIST: (409, "already_exists", "path {} exists already"),
    errno.ELOOP: (400, "invalid_argument", "path {} leads through too many symbolic links"),
    errno.ENAMETOOLONG: (400, "invalid_argument", "path {} is longer than a name (255 bytes) or path (4095) may be"),
    errno.EINVAL: (400, "invalid_argument", "path {} does not allow this"),
    errno.EACCES: (403, "permission_denied", "path {} must not be touched: permission denied"),
    errno.EPERM: (403, "permission_denied", "path {} must not be touched: not permitted"),
    errno.EROFS: (403, "permission_denied", "path {} is on a file system that cannot be written to"),
    # 507 is what SDKs know as a full disk; Connect has nothing like it, and its `resource_exhausted` is a rate limit.
    errno.ENOSPC: (507, "failed_precondition", "path {}: the disk is full. Remove something first"),
    errno.EDQUOT: (507, "failed_precondition", "path {}: the disk quota is used up. Remove something first"),
    errno.EFBIG: (413, "invalid_argument", "path {} would be larger than a file may be"),
    errno.ENXIO: (400, "invalid_argument", "path {} is not a regular file"),
    errno.ENODEV: (400, "invalid_argument", "path {} is not a regular file"),
    errno.EOPNOTSUPP: (400, "invalid_argument", "path {} is on a file system that has no such thing"),
    errno.E2BIG: (400, "invalid_argument", "path {}: this is more metadata than its file system holds"),
    # Of files that are none, such as /proc/self/mem.
    errno.EIO: (400, "failed_precondition", "path {} cannot be read or written"),
    errno.EXDEV: (409, "failed_precondition", "path {} is on another file system"),
    errno.EBUSY: (409, "failed_precondition", "path {} is in use by the system"),
    errno.ETXTBSY: (409, "failed_precondition", "path {} is a program that runs"),
    errno.ENOTEMPTY: (409, "failed_precondition", "path {} is a directory with something in it"),
    errno.EMFILE: (429, "resource_exhausted", "path {}: too many files are open. Try again later"),
    errno.ENFILE: (429, "resource_exhausted", "path {}: too many files are open. Try again later"),
}


def refusal(error: OSError, path: Path | str) -> Refusal:
    """What to answer to an error about a path; one that nobody thought of is a 500 with the system's own words."""
    known = _TABLE.get(error.errno or 0)
    if known is None:
        return Refusal(status=500, code="internal", message=f"path {shown(path)}: {error.strerror or error}")

    status, code, message = known
    return Refusal(status=status, code=code, message=message.format(shown(path)))


def shown(path: Path | str) -> str:
    """A path in quotes, as text that can be sent whatever bytes it is made of, and cut where it is endless."""
    text = os.fspath(path)
    return repr(text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}")
