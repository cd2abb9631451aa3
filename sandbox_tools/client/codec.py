"""Bytes to events and messages, and events to an `Execution`: pure, and flat in memory whatever the code puts out."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from sandbox_tools.errors import ProtocolError
from sandbox_tools.models import Ended, Execution, ExecutionEvent, Failure, Keepalive, Result, Started, Stderr, Stdout

MAX_LINE = 16 * 1024 * 1024
"""Bytes of one event; a longer one is dropped unread."""

MAX_STREAM_END = 64 * 1024
"""Characters kept at the beginning, and again at the end, of stdout and of stderr."""

MAX_RESULTS = 32 * 1024 * 1024
"""Bytes of all results of one execution together."""

RESULT_OVERHEAD = 1024
"""Bytes that a result counts for at least, so that a million tiny ones are bounded too."""

ENVELOPE = struct.Struct(">BI")
"""What precedes each message of a stream: its flags, and how many bytes it has (connectrpc.com/docs/protocol)."""

LAST = 0x02
"""The flag of the message that ends a stream."""

_EVENTS: dict[str, type[ExecutionEvent]] = {
    cls.model_fields["type"].default: cls for cls in (Started, Stdout, Stderr, Result, Failure, Keepalive, Ended)
}

# Servers write `type` as the first field or as the last. Quotes inside a string are escaped, so neither pattern can
# match inside one.
_PEEK = 128
_TYPE_FIRST = re.compile(rb'^\s*\{\s*"type"\s*:\s*"(\w+)"')
_TYPE_LAST = re.compile(rb'"type"\s*:\s*"(\w+)"\s*\}\s*$')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class EventDecoder:
    """Turns the chunks of a stream into events, wherever the chunks are cut.

    Args:
        max_line: Bytes of one line above which it is dropped without being kept in memory. What takes its place says
            how many bytes were left out.
        sandbox_id: For errors.
    """

    def __init__(self, *, max_line: int = MAX_LINE, sandbox_id: str | None = None) -> None:
        self._max_line = max_line
        self._sandbox_id = sandbox_id
        self._line = bytearray()
        self._dropped = 0

    def feed(self, chunk: bytes) -> Iterator[ExecutionEvent]:
        """The events that this chunk completes.

        Raises:
            ProtocolError: A line is not an event.
        """
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._extend(end)
            yield from self.close()

        self._extend(rest)

    def close(self) -> Iterator[ExecutionEvent]:
        """The event of a line that ends here, if there is one: at a line's end, and at the stream's."""
        line, dropped = bytes(self._line), self._dropped
        self._line.clear()
        self._dropped = 0
        event = _placeholder(line, dropped + len(line)) if dropped else _parse(line, self._sandbox_id)
        if event is not None:
            yield event

    def _extend(self, piece: bytes) -> None:
        self._line += piece
        if self._dropped or len(self._line) > self._max_line:
            self._dropped += len(self._line)
            del self._line[_PEEK:-_PEEK]
            self._dropped -= len(self._line)


def _placeholder(ends: bytes, size: int) -> ExecutionEvent:
    found = _TYPE_FIRST.search(ends[:_PEEK]) or _TYPE_LAST.search(ends[-_PEEK:])
    match found and found[1]:
        case b"stdout":
            return Stdout(text="", omitted_bytes=size)
        case b"stderr":
            return Stderr(text="", omitted_bytes=size)
        case b"error":
            value = f"The code raised an exception whose text of {size} bytes was left out."
            return Failure(name="OversizedError", value=value)
        case _:  # Nothing else of the protocol can be this long.
            return Result(omitted_bytes=size)


def _parse(line: bytes, sandbox_id: str | None) -> ExecutionEvent | None:
    if not line.strip():
        return None

    try:
        data = decoded(line, "run_code")
        event = _EVENTS.get(data["type"])
        return event.model_validate(data) if event else None
    except (ProtocolError, TypeError, KeyError, ValidationError):
        msg = f"The sandbox sent a line of {len(line)} bytes that is not an event. Check what answers at its address."
        # Neither the line nor pydantic's error is shown: a server may quote a token.
        raise ProtocolError(msg, op="run_code", sandbox_id=sandbox_id) from None


def decoded(data: bytes, op: str) -> dict[str, Any]:
    """A message of Connect; a `ProtocolError` of the verb `op` where it is none."""
    try:
        value = json.loads(data)
        if _SURROGATE.search(data):
            # Code may print half a surrogate pair, which no UTF-8 text can hold.
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        msg = f"The sandbox sent {len(data)} bytes that are not a message. Check what answers at its address."
        raise ProtocolError(msg, op=op)

    return value


class EnvelopeDecoder:
    """Turns the chunks of a stream of Connect into messages, wherever the chunks are cut.

    Args:
        op: The caller's verb, for errors.
        max_message: Bytes of one message above which the stream is refused, before they are in memory.
    """

    def __init__(self, op: str, *, max_message: int = MAX_LINE) -> None:
        self._op = op
        self._max_message = max_message
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[dict[str, Any], bool]]:
        """The messages that this chunk completes, each with whether it is the one that ends the stream.

        Raises:
            ProtocolError: This is no envelope, or a compressed one. Nothing can be read after that.
        """
        self._buffer += chunk
        while len(self._buffer) >= ENVELOPE.size:
            flags, length = ENVELOPE.unpack_from(self._buffer)
            if flags & ~LAST or length > self._max_message:
                msg = f"`{self._op}` was answered with an envelope of {length} bytes, flags {flags:#x}. Ask for less."
                raise ProtocolError(msg, op=self._op)

            stop = ENVELOPE.size + length
            if len(self._buffer) < stop:
                return

            payload = bytes(self._buffer[ENVELOPE.size : stop])
            del self._buffer[:stop]
            yield decoded(payload, self._op), bool(flags)


class ExecutionCollector:
    """Folds the events of one execution into an `Execution`.

    Args:
        max_stream_end: Characters of stdout, and of stderr, kept at the beginning and again at the end.
        max_results: Bytes of all results together; those that do not fit leave only their size.
    """

    def __init__(self, *, max_stream_end: int = MAX_STREAM_END, max_results: int = MAX_RESULTS) -> None:
        self._streams = {Stdout: _Ends(max_stream_end), Stderr: _Ends(max_stream_end)}
        self._results: list[Result] = []
        self._room = max_results
        self._crowded_out = 0
        self._failure: Failure | None = None
        self._execution_count: int | None = None

    def add(self, event: ExecutionEvent) -> None:
        """Takes the next event."""
        match event:
            case Stdout() | Stderr():
                self._streams[type(event)].add(event.text, event.omitted_bytes)
            case Result():
                self._add_result(event)
            case Failure():
                self._failure = self._failure or event
            case Started():
                self._execution_count = event.execution_count

    def execution(self) -> Execution:
        """What was collected so far."""
        rest = [Result(omitted_bytes=self._crowded_out)] if self._crowded_out else []
        (stdout, stdout_omitted), (stderr, stderr_omitted) = (ends.text() for ends in self._streams.values())
        return Execution(
            results=self._results + rest,
            stdout=stdout,
            stderr=stderr,
            stdout_omitted=stdout_omitted,
            stderr_omitted=stderr_omitted,
            failure=self._failure,
            execution_count=self._execution_count,
        )

    def _add_result(self, result: Result) -> None:
        size = max(len(result.model_dump_json(by_alias=True, exclude_none=True)), RESULT_OVERHEAD)
        if size > self._room:
            result = Result(omitted_bytes=size, is_main_result=result.is_main_result)
            size = RESULT_OVERHEAD

        if size > self._room:
            self._crowded_out += result.omitted_bytes
            return

        self._room -= size
        self._results.append(result)


class _Ends:
    """The beginning and the end of a text of any length."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head: str | None = None
        """None: all is in the pieces still."""
        self._pieces: list[str] = []
        self._length = 0
        self._lost = 0

    def add(self, text: str, dropped: int = 0) -> None:
        if dropped:
            # What follows a gap belongs to the end, or the gap would not show.
            self._head, tail, lost = self.parts()
            self._pieces, self._length, self._lost = [], 0, lost + len(tail) + dropped

        if text:
            self._pieces.append(text)
            self._length += len(text)

        # Not at every piece: that would copy all that is kept for every character printed.
        if self._length > 3 * self._limit:
            self._head, tail, self._lost = self.parts()
            self._pieces, self._length = [tail], len(tail)

    def parts(self) -> tuple[str, str, int]:
        """The beginning, the end, and how much was left out between them."""
        text = "".join(self._pieces)
        head, rest = (text[: self._limit], text[self._limit :]) if self._head is None else (self._head, text)
        tail = rest[-self._limit :]
        return head, tail, self._lost + len(rest) - len(tail)

    def text(self) -> tuple[str, int]:
        """All of it, or what is left with a line that says how much was left out; and that number."""
        head, tail, lost = self.parts()
        return f"{head}\n[{lost} characters left out]\n{tail}" if lost else head + tail, lost
