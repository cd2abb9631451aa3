"""Bodies of uploads on their way to disk: decoded, taken apart, and each file put in its place whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import zlib
from email.message import Message
from email.utils import collapse_rfc2231_value
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError

from sandbox_tools.guest import metadata as meta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from sandbox_tools.guest.accounts import Account

UNFINISHED = ".upload-"
"""How the name of a file begins that is still being uploaded; it lies beside its place, on the same file system.

Nothing but the death of the guest itself leaves one behind; it may be removed then.
"""

REPLACING = f"{UNFINISHED}over-"
"""The same, where another file is in its place already."""

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

INFLATED = 1 << 20
"""Bytes that are decompressed at a time, so that a small body can't fill the memory."""

HEADER_BYTES = 1 << 13
"""Of one header of a part. A path may have 4095 bytes, and a quoted one twice as many."""


class BadBodyError(ValueError):
    """Raised for a body that cannot be what its headers say; the text says why."""


class Incoming:
    """One file that is being written; `finish` puts it in its place, `abandon` leaves no trace of it.

    It is a new file under the old name: whoever has the old one open, or another name of it, keeps the old content.

    Args:
        path: Where it goes; where that is a symbolic link, what it leads to.
        account: Whose it will be, with the parents that have to be made.
        metadata: What is attached to it.

    Raises:
        OSError: It cannot be there.
    """

    def __init__(self, path: Path, account: Account, metadata: Mapping[str, str]) -> None:
        self.path = path
        self._account = account
        self._metadata = metadata
        self._target = Path(os.path.realpath(path))
        there = self._replaced_mode()
        self._mode = FILE_MODE if there is None else there
        make_parents(self._target.parent, account)
        beginning = UNFINISHED if there is None else REPLACING
        self._partial = self._target.parent / f"{beginning}{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._partial, flags, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        """Appends."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        """Puts the file in its place, over whatever file was there; the place is never empty and never half full."""
        self._account.own(self._fd)
        os.fchmod(self._fd, self._mode)
        meta.store(self._fd, self._metadata)
        self._replaced_mode()  # what came there in the meantime may be nothing that a file may replace
        os.rename(self._partial, self._target)
        fd, self._fd = self._fd, -1
        try:
            _write_visibly(fd)
        finally:
            os.close(fd)

    def abandon(self) -> None:
        """Removes what has been written, unless it is in its place; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._partial)

    def _replaced_mode(self) -> int | None:
        """The permissions of the file that is to be replaced; None where there is none."""
        try:
            mode = os.stat(self._target).st_mode
        except FileNotFoundError:
            return None

        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        # What made it run as its owner was meant for another content.
        return stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID)


def _write_visibly(fd: int) -> None:
    """Changes nothing, but lets those who watch the directory see a write, and not only a name that appears."""
    with contextlib.suppress(OSError):  # the file is in its place, so the upload has not failed
        if size := os.fstat(fd).st_size:
            os.pwrite(fd, os.pread(fd, 1, size - 1), size - 1)
        else:
            os.ftruncate(fd, 0)


def make_parents(directory: Path, account: Account) -> None:
    """Makes a directory and its parents as far as they are missing; the new ones belong to the account.

    Raises:
        OSError: One of them cannot be made; ENOTDIR where something else is in its place.
    """
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for each in reversed(missing):
        try:
            os.mkdir(each, DIRECTORY_MODE)
        except FileExistsError:
            if not each.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        else:
            account.own(each)


class Body(Protocol):
    """What takes in the bytes of an upload."""

    def feed(self, data: bytes) -> None:
        """Takes in some bytes."""

    def finish(self) -> None:
        """Says that these were all."""

    def abandon(self) -> None:
        """Gives up what is not in its place yet."""


class Multipart:
    """A form with files in its parts; those that are not called `file` are passed over (RFC 7578).

    Args:
        content_type: The header of the request, with the boundary.
        begin: Called for each file with the name that it goes by, None where it has none.

    Raises:
        BadBodyError: Not such a form; also from `feed` and `finish`.
    """

    def __init__(self, content_type: str, begin: Callable[[str | None], Incoming]) -> None:
        boundary = _parameter(content_type, "content-type", "boundary")
        if not boundary:
            msg = "the content type of the form names no boundary. Send it as an HTTP library builds it."
            raise BadBodyError(msg)

        self._begin = begin
        self._file: Incoming | None = None
        self._field = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary.encode("latin-1", "replace"),
                {
                    "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
                max_header_size=HEADER_BYTES,
            )
        except FormParserError as error:
            msg = f"the form cannot be read: {error}"
            raise BadBodyError(msg) from None

    def feed(self, data: bytes) -> None:
        """Takes in some bytes."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            msg = f"the form cannot be read: {error}"
            raise BadBodyError(msg) from None

    def finish(self) -> None:
        """Says that these were all."""
        if not self._ended:
            msg = "the form ends before its last boundary. Send it again."
            raise BadBodyError(msg)

    def abandon(self) -> None:
        """Gives up the part that is under way."""
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        try:
            disposition = self._disposition.decode()
        except UnicodeDecodeError:
            msg = "a part of the form has a name that is not UTF-8. Name it otherwise."
            raise BadBodyError(msg) from None
        self._disposition = b""
        if _parameter(disposition, "content-disposition", "name") == "file":
            self._file = self._begin(_parameter(disposition, "content-disposition", "filename"))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])

    def _on_part_end(self) -> None:
        if self._file is not None:
            self._file.finish()
            self._file = None

    def _on_end(self) -> None:
        self._ended = True


class Raw:
    """A body that is one file."""

    def __init__(self, file: Incoming) -> None:
        self._file = file

    def feed(self, data: bytes) -> None:
        """Takes in some bytes."""
        self._file.write(data)

    def finish(self) -> None:
        """Says that these were all."""
        self._file.finish()

    def abandon(self) -> None:
        """Gives the file up."""
        self._file.abandon()


async def inflated(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A gzipped body's content, of one member or several (RFC 1952), in pieces of a bounded size.

    Raises:
        BadBodyError: It is not gzip, is damaged or ends too early.
    """
    member = zlib.decompressobj(wbits=31)
    async for data in body:
        full = False
        while data or full:
            if member.eof:
                member = zlib.decompressobj(wbits=31)
            try:
                piece = member.decompress(data, INFLATED)
            except zlib.error as error:
                msg = f"the body is not what `Content-Encoding: gzip` says: {error}. Send it again."
                raise BadBodyError(msg) from None
            data = member.unused_data if member.eof else member.unconsumed_tail
            # A full piece may leave more inside, also when all of the input has been taken in.
            full = len(piece) == INFLATED and not member.eof
            yield piece
            await asyncio.sleep(0)  # others have their turn, however much comes out of a little
    if not member.eof:
        msg = "the gzipped body ends too early. Send it again."
        raise BadBodyError(msg)


def _parameter(header: str, kind: str, name: str) -> str | None:
    """A parameter of a header such as `form-data; name="x"`; None where it has none."""
    message = Message()
    message[kind] = header
    value = message.get_param(name, header=kind)
    return collapse_rfc2231_value(value) if isinstance(value, tuple) else value
