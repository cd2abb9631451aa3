"""The messages of Connect as bytes: JSON objects, and the envelopes that streams put them in; no input or output."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Message = dict[str, Any]

HEADER = struct.Struct(">BI")

COMPRESSED = 0x01
END = 0x02

MAX_MESSAGE = 4 << 20
"""Bytes that one message of a caller may have, as in gRPC's servers. It is held in memory a few times over while it is
decoded, in a process that all of the sandbox depends on; what is bigger comes as a stream, or as a file."""


class EnvelopeError(Exception):
    """Raised for bytes that are no message; the text says what is wrong with them.

    Args:
        code: Connect's word for it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as it is sent: compact JSON."""
    return json.dumps(message, separators=(",", ":")).encode()


def decode(data: bytes | bytearray) -> Message:
    """A message as it was received.

    Raises:
        EnvelopeError: It is not a JSON object, in valid UTF-8, of a sensible depth.
    """
    try:
        message = json.loads(data.decode(), parse_constant=_refuse)
        if b"\\u" in data:
            # Half of a surrogate pair can be written in JSON, but is no text that anybody could use.
            json.dumps(message, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        msg = f"The message is not JSON ({str(error)[:200]}). Send a JSON object."
        raise EnvelopeError("invalid_argument", msg) from error
    if not isinstance(message, dict):
        raise EnvelopeError("invalid_argument", "The message is not a JSON object. Send one.")

    return message


def envelope(message: Mapping[str, Any], flags: int = 0) -> bytes:
    """A message in its envelope."""
    data = encode(message)
    return HEADER.pack(flags, len(data)) + data


def end(error: tuple[str, str] | None = None) -> bytes:
    """The envelope that ends a stream.

    Args:
        error: Connect's code and a text. None: the stream ended well.
    """
    return envelope({} if error is None else {"error": {"code": error[0], "message": error[1]}}, END)


class EnvelopeReader:
    """Cuts a stream of bytes, however it comes in, into messages.

    Raises, in each method:
        EnvelopeError: What came in is not a stream of messages. Nothing can be read after that.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Takes in bytes; returns the messages that they complete."""
        self._buffer += data
        messages = []
        at = 0
        while len(self._buffer) - at >= HEADER.size:
            flags, length = HEADER.unpack_from(self._buffer, at)
            _check(flags, length)
            stop = at + HEADER.size + length
            if len(self._buffer) < stop:
                break

            messages.append(decode(self._buffer[at + HEADER.size : stop]))
            at = stop

        del self._buffer[:at]
        return messages

    def finish(self) -> None:
        """To be called when no more bytes will come."""
        if self._buffer:
            msg = f"The stream ends within an envelope, after {len(self._buffer)} bytes of it. Send it whole."
            raise EnvelopeError("invalid_argument", msg)


def _check(flags: int, length: int) -> None:
    if flags & COMPRESSED:
        msg = "The envelope is compressed, and nothing is decompressed here. Send it with the encoding `identity`."
        raise EnvelopeError("unimplemented", msg)
    if flags:
        msg = f"The envelope has the flags {flags:#04x}; those of a request's message are 0. Send it with 0."
        raise EnvelopeError("invalid_argument", msg)
    if length > MAX_MESSAGE:
        msg = f"The message has {length} bytes; {MAX_MESSAGE} are possible. Send it in parts, or as a file."
        raise EnvelopeError("resource_exhausted", msg)


def _refuse(constant: str) -> None:
    msg = f"{constant} is not a value of JSON"
    raise ValueError(msg)
