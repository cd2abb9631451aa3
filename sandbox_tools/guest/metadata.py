"""What users attach to files: extended attributes, which move, are paused and die with the file."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

ATTRIBUTE = "user.e2b."
HEADER = b"x-metadata-"

KEY_BYTES = 255 - len(ATTRIBUTE)
"""The longest key: Linux allows 255 bytes for an attribute's whole name (xattr(7))."""

TOTAL_BYTES = 4096
"""Keys and values together; some file systems keep all attributes of a file in one block."""


class BadMetadataError(ValueError):
    """Raised for metadata that is not stored; the text says why."""


def from_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The metadata that a request's `X-Metadata-*` headers carry; their keys are lower case.

    Raises:
        BadMetadataError: A key that is empty, too long or there twice, a value that is not printable, or too much.
    """
    metadata: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(HEADER):
            continue

        key = name.removeprefix(HEADER).decode("latin-1")
        if not 0 < len(key) <= KEY_BYTES:
            msg = f"metadata key {key[:50]!r} has {len(key)} bytes. Use 1 to {KEY_BYTES}."
            raise BadMetadataError(msg)
        if key in metadata:
            msg = f"metadata key {key!r} is there twice. Send it once."
            raise BadMetadataError(msg)
        if not all(0x20 <= byte <= 0x7E for byte in value):
            msg = f"the metadata value of key {key!r} is not printable ASCII. Encode it."
            raise BadMetadataError(msg)
        metadata[key] = value.decode("ascii")

    total = sum(len(key) + len(value) for key, value in metadata.items())
    if total > TOTAL_BYTES:
        msg = f"the metadata has {total} bytes in all. Use {TOTAL_BYTES} at most."
        raise BadMetadataError(msg)
    return metadata


def store(fd: int, metadata: Mapping[str, str]) -> None:
    """Attaches metadata to a new file.

    Raises:
        OSError: The file system has no attributes, or no room for these.
    """
    for key, value in metadata.items():
        os.setxattr(fd, ATTRIBUTE + key, value.encode("ascii"))


def load(path: Path) -> dict[str, str]:
    """The metadata of a file, a link's target's for a link; empty where there is none or can be none."""
    metadata: dict[str, str] = {}
    try:
        for name in os.listxattr(path):
            if name.startswith(ATTRIBUTE):
                value = os.getxattr(path, name).decode(errors="replace")
                metadata[os.fsencode(name.removeprefix(ATTRIBUTE)).decode(errors="replace")] = value
    except OSError as error:
        # Gone since, dangling, or on a file system without attributes: none of it makes the entry unreadable.
        if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ELOOP, errno.ENODATA, errno.EACCES, errno.EPERM):
            raise
    return metadata
