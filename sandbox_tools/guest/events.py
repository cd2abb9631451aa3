"""From Jupyter's messages to the lines that `/execute` streams: pure, no I/O."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sandbox_tools.guest.channels import Message

Event = dict[str, Any]
"""One line: a JSON object whose `type` says which."""

KEEPALIVE: Event = {"type": "keepalive"}
ENDED: Event = {"type": "end_of_execution"}

TEXT_LIMIT = 16 * 1024
"""Characters of output in one event: at most 64 KiB as UTF-8."""

FIELDS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "text/latex": "latex",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}
"""MIME type to field of a `result`; any other type goes into its `extra`."""


def line(event: Event) -> bytes:
    """One line of the stream. Lone surrogates, which UTF-8 cannot hold, become question marks."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def failure(name: str, value: str, traceback: str = "") -> Event:
    """An `error` event."""
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def translate(message: Message) -> Iterator[Event]:
    """The events of one iopub message: none for what the wire does not know, several for a long output."""
    content = message.content
    match message.kind:
        case "execute_input":
            yield {"type": "number_of_executions", "execution_count": content["execution_count"]}
        case "stream":
            text = content["text"]
            for start in range(0, len(text), TEXT_LIMIT):
                yield {"type": content["name"], "text": text[start : start + TEXT_LIMIT], "timestamp": message.date}
        case "display_data" | "execute_result" as kind:
            yield _result(content["data"], is_main=kind == "execute_result")
        case "error":
            yield failure(content["ename"], content["evalue"], "\n".join(content["traceback"]))


def _result(data: Mapping[str, Any], *, is_main: bool) -> Event:
    event: Event = {"type": "result", "is_main_result": is_main}
    extra = {}
    for mime, value in data.items():
        field = FIELDS.get(mime)
        if field is None:
            extra[mime] = value
        elif field == "text":
            event[field] = _unquoted(value)
        elif field in ("png", "jpeg", "pdf"):
            event[field] = value.rstrip("\n")
        else:
            event[field] = value
    if extra:
        event["extra"] = extra

    return event


def _unquoted(text: str) -> str:
    """The repr of a string without its quotes, as E2B's own server sends it."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]

    return text
