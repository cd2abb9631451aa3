"""envd's `/files`: a file of the sandbox is read with GET and written with POST."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mimetypes
import os
import re
import stat
import zlib
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sandbox_tools.guest import metadata as meta
from sandbox_tools.guest.accounts import Account, BadPathError, UnknownUserError, account, resolve
from sandbox_tools.guest.refusals import refusal, shown
from sandbox_tools.guest.uploads import BadBodyError, Body, Incoming, Multipart, Raw, inflated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

CHUNK = 1 << 18
"""Bytes that are read at a time. Files in a sandbox are read and written at more than 1 GB/s, so that a chunk keeps the
loop waiting for less time than handing it to a thread would."""

LAST_DATE = 253402300799
"""Seconds: the end of the year 9999, after which HTTP has no dates, but files may have."""

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*$", re.IGNORECASE)


def routes() -> list[Route]:
    """GET (with HEAD) and POST of `/files`."""
    return [Route("/files", _files, methods=["GET", "POST"])]


async def _files(request: Request) -> Response:
    return await (_upload if request.method == "POST" else _download)(request)


async def _download(request: Request) -> Response:
    query = _query(request)
    path = _resolved(query.get("path", ""), _account(query))
    encoding = _encoding(request.headers.get("accept-encoding", ""))
    if encoding is None:
        raise HTTPException(406, "a file is sent as it is (`identity`) or with `gzip`. Accept one of them.")

    with _refused(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            return _answer(request, path, fd, encoding)
        except BaseException:
            os.close(fd)
            raise


def _answer(request: Request, path: Path, fd: int, encoding: str) -> Response:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.ENXIO
        raise OSError(number, os.strerror(number))

    headers = {
        "last-modified": formatdate(min(max(info.st_mtime, 0), LAST_DATE), usegmt=True),
        "content-disposition": _disposition(path.name),
        "accept-ranges": "bytes",
        "vary": "Accept-Encoding",
    }
    # What a small file holds is known only once it is read: those in /proc claim to be empty. It is read at once, so
    # that it is also whole as of one moment.
    start = _read(fd, CHUNK)
    size = len(start) if len(start) < CHUNK else os.fstat(fd).st_size
    endless = size < CHUNK == len(start)
    wanted = range(size)
    status = 200
    if endless:
        headers["accept-ranges"] = "none"
    elif encoding == "identity" and _range_applies(request, headers["last-modified"]):
        if (part := _part(request.headers["range"], size)) is not None:
            if not part:
                message = f"path {shown(path)} has {size} bytes: the range {request.headers['range']!r} is not in it."
                raise HTTPException(416, message, headers={"content-range": f"bytes */{size}"})
            wanted, status = part, 206
            headers["content-range"] = f"bytes {wanted[0]}-{wanted[-1]}/{size}"

    pieces = _pieces(fd, start, None if endless else wanted)
    if encoding == "gzip":
        headers["content-encoding"] = "gzip"
        pieces = _gzipped(pieces)
    elif not endless:
        headers["content-length"] = str(len(wanted))
    guessed, packed = mimetypes.guess_type(path.name)
    media_type = "application/octet-stream" if packed or not guessed else guessed
    return _Opened(fd, request.method, pieces, status_code=status, headers=headers, media_type=media_type)


class _Opened(StreamingResponse):
    """An answer that closes its file, however it ends."""

    def __init__(self, fd: int, method: str, pieces: AsyncIterator[bytes], **more: Any) -> None:
        super().__init__(pieces, **more)
        self._fd = fd
        self._method = method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._method == "HEAD":
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b""})
            else:
                await super().__call__(scope, receive, send)
        finally:
            os.close(self._fd)


async def _pieces(fd: int, start: bytes, wanted: range | None) -> AsyncIterator[bytes]:
    """The wanted bytes; None: all that there are. `start` are the first of the file."""
    if wanted is None:
        while start:
            yield start
            start = _read(fd, CHUNK)
            await asyncio.sleep(0)
        return

    at, end = wanted.start, wanted.stop
    if at < len(start):
        yield start[at:end]
        at = min(len(start), end)
    while at < end:
        piece = os.pread(fd, min(CHUNK, end - at), at)
        if not piece:
            # The length has been announced: a connection that breaks is better than a file that is said to be whole.
            msg = f"The file ended at {at} bytes while it was sent; {end} were there when that began."
            raise EOFError(msg)
        yield piece
        at += len(piece)
        # What is sent to a reader that has gone is dropped without a wait; only the loop can say that it has gone.
        await asyncio.sleep(0)


async def _gzipped(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    squeeze = zlib.compressobj(level=1, wbits=31)
    async for piece in pieces:
        yield await asyncio.to_thread(squeeze.compress, piece)
    yield squeeze.flush()


async def _upload(request: Request) -> Response:
    query = _query(request)
    owner = _account(query)
    given = query.get("path")
    try:
        metadata = meta.from_headers(request.headers.raw)
    except meta.BadMetadataError as error:
        raise HTTPException(400, str(error)) from None

    written: list[Incoming] = []

    def begin(name: str | None) -> Incoming:
        if not given and not name:
            raise HTTPException(400, "a file without a name cannot be put anywhere. Give `path`, or a file name.")
        path = _resolved(given or name or "", owner)
        if any(path == file.path for file in written):
            raise HTTPException(400, f"path {shown(path)} is there twice in this upload. Send each file once.")
        with _refused(path):
            written.append(Incoming(path, owner, metadata))
        return written[-1]

    with _refused_body(written):
        body = _body(request, given, begin)
        try:
            async for data in _content(request):
                body.feed(data)
            body.finish()
        finally:
            body.abandon()

    if not written:
        raise HTTPException(400, "the form has no part called `file`. Send each file in one.")
    return JSONResponse(
        [
            {"path": _text(file.path), "name": _text(file.path.name), "type": "file"}
            | ({"metadata": metadata} if metadata else {})
            for file in written
        ]
    )


def _body(request: Request, given: str | None, begin: Any) -> Body:
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return Multipart(content_type, begin)
    if kind == "application/octet-stream":
        if not given:
            raise HTTPException(400, "`path` is missing. Say where the file goes.")
        return Raw(begin(None))

    message = f"content type {kind!r} is no upload. Send `multipart/form-data` or `application/octet-stream`."
    raise HTTPException(400, message)


def _content(request: Request) -> AsyncIterator[bytes]:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return request.stream()
    if coding == "gzip":
        return inflated(request.stream())

    raise HTTPException(400, f"content encoding {coding!r} is unknown. Send the body as it is, or with `gzip`.")


def _query(request: Request) -> dict[str, str]:
    try:
        text = request.scope["query_string"].decode()
        return dict(parse_qsl(text, keep_blank_values=True, errors="strict"))
    except UnicodeDecodeError:
        raise HTTPException(400, "the query is not UTF-8. Encode it so.") from None


def _account(query: dict[str, str]) -> Account:
    try:
        return account(query.get("username"))
    except UnknownUserError as error:
        raise HTTPException(401, str(error)) from None


def _resolved(path: str, owner: Account) -> Path:
    try:
        return resolve(path, owner)
    except BadPathError as error:
        raise HTTPException(400, str(error)) from None


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns the system's errors about a path into answers."""
    try:
        yield
    except OSError as error:
        why = refusal(error, path)
        raise HTTPException(why.status, why.message) from error


@contextlib.contextmanager
def _refused_body(written: list[Incoming]) -> Iterator[None]:
    """Turns what goes wrong while a body comes in into answers; the last file is the one that it is about."""
    try:
        yield
    except BadBodyError as error:
        raise HTTPException(400, str(error)) from None
    except ClientDisconnect:
        # Nobody is there to read it.
        raise HTTPException(400, "the connection broke before the whole body was here. Send it again.") from None
    except OSError as error:
        why = refusal(error, written[-1].path if written else "")
        raise HTTPException(why.status, why.message) from error


def _encoding(accepted: str) -> str | None:
    """How to send a file to whoever accepts this: as it is wherever that is allowed, for gzip costs more than it saves
    on one machine. None: neither as it is nor with gzip (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for item in accepted.lower().split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        weights[coding] = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                with contextlib.suppress(ValueError):
                    weights[coding] = float(parameter[2:])
    if weights.get("identity", weights.get("*", 1.0)) > 0:
        return "identity"
    return "gzip" if weights.get("gzip", weights.get("*", 0.0)) > 0 else None


def _range_applies(request: Request, last_modified: str) -> bool:
    """Whether a part is asked for, of this version of the file."""
    return "range" in request.headers and request.headers.get("if-range", last_modified) == last_modified


def _part(header: str, size: int) -> range | None:
    """The bytes that a `Range` header asks for; empty where there are none of them. None: it is to be ignored, as one
    that is malformed, or that asks for several parts, may be (RFC 9110, 14.2)."""
    match = _RANGE.match(header)
    if match is None or match[1] == match[2] == "":
        return None

    if match[1] == "":
        return range(max(size - int(match[2]), 0), size)
    first = int(match[1])
    last = int(match[2]) if match[2] else size - 1
    if match[2] and last < first:
        return None
    return range(first, min(last + 1, size))


def _disposition(name: str) -> str:
    encoded = quote(os.fsencode(name))
    return f'inline; filename="{name}"' if encoded == name else f"inline; filename*=utf-8''{encoded}"


def _read(fd: int, limit: int) -> bytes:
    """Up to `limit` bytes, fewer only at the end of the file."""
    pieces = []
    while limit and (piece := os.read(fd, limit)):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _text(path: Path | str) -> str:
    return os.fsencode(path).decode(errors="replace")
