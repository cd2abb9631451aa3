"""Turns outcomes and errors into what the model reads, and caps what it reads; no sandbox id ever gets past here."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages.content import create_image_block, create_text_block

from sandbox_tools.errors import (
    AccessDeniedError,
    AuthenticationError,
    CapacityError,
    ConflictError,
    ExecutionTimeoutError,
    NotFoundError,
    OwnershipError,
    ProtocolError,
    RateLimitError,
    SandboxBusyError,
    SandboxError,
    SandboxExpiredError,
    SandboxStateError,
    ServerError,
    StateLostError,
    TransportError,
)
from sandbox_tools.models import CommandResult, Execution, Result
from sandbox_tools.session.retention import PausedSandbox
from sandbox_tools.tools.tables import as_markdown
from sandbox_tools.tools.tracebacks import trimmed

TEXT_LIMIT = 20_000
"""Characters of one result, its beginning and its end together."""

IMAGES = 4

IMAGE_LIMIT = 1_500_000
"""Characters of one image in base64."""

SANDBOX_LOST = (
    "Note: your earlier sandbox is gone, and all variables, processes and files in it are lost. "
    "You start with a new, empty one: import, load and compute again what you need."
)

WOKE_WITHOUT = {
    frozenset({"memory"}): (
        "Note: your sandbox woke with its files, but without its memory: variables, imports and processes are gone. "
        "Load and compute again what you need."
    ),
    frozenset({"files"}): (
        "Note: your sandbox woke with files of an earlier time: look at them before you rely on them, and write again "
        "what is missing."
    ),
    frozenset({"files", "memory"}): (
        "Note: your sandbox woke in an earlier state: variables, processes and files are not what they were. Look "
        "before you rely on them, and make again what is missing."
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """What a tool hands to the model, and beside it, to the program.

    Attributes:
        blocks: Standard content blocks, text first.
        artifact: Plain data without raw bytes, because checkpoints keep it.
    """

    blocks: list[dict[str, Any]]
    artifact: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, **artifact: Any) -> Rendered:
        """A text only."""
        return cls(blocks=[dict(create_text_block(text))], artifact=artifact)


class RetryableByModel(Exception):
    """The call did not happen as asked, and the message tells the model what to change or when to try again."""


def render(execution: Execution, *, before: str = "") -> Rendered:
    """An execution as text and images.

    Args:
        before: A sentence to say first, such as `SANDBOX_LOST`.
    """
    sections = [before]
    images: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    if execution.stdout or execution.stdout_omitted:
        sections.append(_omission(execution.stdout, execution.stdout_omitted, "standard output"))
    if execution.stderr or execution.stderr_omitted:
        sections.append("Standard error:\n" + _omission(execution.stderr, execution.stderr_omitted, "standard error"))
    for result in execution.results:
        block, facts, text = _result(result, room=len(images) < IMAGES)
        if block is not None:
            images.append(block)
        described.extend(facts)
        sections.append(text)
    if execution.failure is not None:
        failure = execution.failure
        sections.append(trimmed(failure.traceback) or f"{failure.name}: {failure.value}")
    if not any(sections) and not images:
        sections.append("The code ran and put nothing out.")

    text, rest = _joined(sections)
    blocks = [dict(create_text_block(text))] if text else []
    artifact = {
        "execution_count": execution.execution_count,
        "failure": execution.failure.name if execution.failure else None,
        "images": described,
        **rest,
    }
    return Rendered(blocks=[*blocks, *images], artifact=artifact)


def render_command(result: CommandResult, *, before: str = "") -> Rendered:
    """A command's output and, where it failed, how.

    Args:
        before: A sentence to say first.
    """
    sections = [before]
    if result.stdout or result.stdout_omitted:
        sections.append(_omission(result.stdout, result.stdout_omitted, "standard output"))
    if result.stderr or result.stderr_omitted:
        sections.append("Standard error:\n" + _omission(result.stderr, result.stderr_omitted, "standard error"))
    if result.exit_code and not before:
        sections.append(f"It failed: {result.error or f'exit status {result.exit_code}'}.")
    if not any(sections):
        sections.append("The command ran and put nothing out.")
    text, rest = _joined(sections)
    return Rendered.of(text, exit_code=result.exit_code, error=result.error, **rest)


def _joined(sections: list[str]) -> tuple[str, dict[str, str]]:
    """The sections as a model reads them, and for the artifact the whole where that is more."""
    whole = "\n".join(section.rstrip("\n") for section in sections if section)
    text = capped(whole)
    return text, {} if text == whole else {"whole": whole}


def render_timeout(error: ExecutionTimeoutError, seconds: float) -> Rendered:
    """What code put out until its time was up."""
    before = (
        f"The code was interrupted after {seconds:g} s. Variables, files and processes are kept. "
        "Give it a longer `timeout`, split it, or start it in the background. Until then it had put out:"
    )
    rendered = render(error.partial or Execution(), before=before)
    return Rendered(blocks=rendered.blocks, artifact={**rendered.artifact, "failure": "timeout"})


def capped(text: str) -> str:
    """At most about `TEXT_LIMIT` characters: the beginning, a sentence on what is left out, and the end."""
    if len(text) <= TEXT_LIMIT:
        return text
    half = TEXT_LIMIT // 2
    left_out = len(text) - 2 * half
    return (
        f"{text[:half]}\n[{left_out} characters are left out here. Write long output to a file and read parts of it.]\n"
        f"{text[-half:]}"
    )


def render_lost(lost: frozenset[str]) -> str:
    """The sentence for what `Session.take_lost` gives; it is not empty."""
    return SANDBOX_LOST if "sandbox" in lost else WOKE_WITHOUT[lost]


def render_paused(sandboxes: list[PausedSandbox]) -> Rendered:
    """A listing of the owner's paused sandboxes."""
    if not sandboxes:
        return Rendered.of("No sandbox is paused.", handles=[])
    lines = []
    for paused in sandboxes:
        size = "" if paused.snapshot_bytes is None else f", {paused.snapshot_bytes / 1e6:.0f} MB"
        whose = "this conversation's own" if paused.current else "from an earlier conversation"
        soon = f", will be deleted on {paused.expires_at:%Y-%m-%d}" if paused.expiring and paused.expires_at else ""
        lines.append(f"{paused.handle}: paused {_ago(paused.age)} ago{size}, {whose}{soon}")
    return Rendered.of("\n".join(lines), handles=[paused.handle for paused in sandboxes])


def render_error(error: SandboxError) -> Rendered:
    """What the model reads of an error it can do something about, in words of ours: the error's may hold an id.

    Raises:
        RetryableByModel: It is safe to call again, perhaps with something changed.
        SandboxError: The error itself, where only the operator can help.
    """
    match error:
        case OwnershipError():
            msg = "There is no such sandbox for you. Take a handle from `list_paused_sandboxes`."
            raise RetryableByModel(msg) from error
        case SandboxBusyError() | ConflictError():
            msg = "The sandbox is in use or just being paused or woken. Wait for your other calls, then try again."
            raise RetryableByModel(msg) from error
        case CapacityError() | RateLimitError():
            msg = "There is no room for the sandbox just now; nothing was run. Try again in a minute."
            raise RetryableByModel(msg) from error
        case StateLostError():
            lost = " and ".join(sorted(error.lost))
            return _failed(f"The sandbox woke, but its {lost} are not what they were. Check before you rely on them.")
        case SandboxExpiredError():
            return _failed("The sandbox is gone, and its variables and files with it. The next call gets a new one.")
        case NotFoundError() if error.sandbox_id is not None:
            return _failed("The sandbox is there, and all in it, but not what this call needs. Look at what there is.")
        case SandboxStateError():
            return _failed("The sandbox fell asleep during this call. Call again, and look at what has been done.")
        case AuthenticationError() | AccessDeniedError() | ProtocolError():
            raise error
        case TransportError() | ServerError():
            if error.retryable:
                msg = "The sandbox could not be reached; nothing was run. Try again in a moment."
                raise RetryableByModel(msg) from error
            return _failed(
                "The connection to the sandbox broke. The code may have run, wholly or in part: "
                "look at the state before you run it again."
            )
        case _:
            raise error


def _failed(text: str) -> Rendered:
    return Rendered.of(text, failure="sandbox")


def _omission(text: str, omitted: int, name: str) -> str:
    return f"{text}\n[{omitted} characters of {name} were left out of its middle.]" if omitted else text


def _result(result: Result, *, room: bool) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """One displayed value: its image, facts on it for the artifact, and what is said of it."""
    if result.omitted_bytes:
        return None, [], f"[A value of {result.omitted_bytes} bytes was too large to show. Save it to a file instead.]"

    data, mime_type = (result.png, "image/png") if result.png else (result.jpeg, "image/jpeg")
    if data:
        data = "".join(data.split())
        facts = _facts(data, mime_type)
        if facts is None:
            return None, [], "[An image could not be read and is not shown.]"
        if not room:
            return None, [facts], f"[One image more than the {IMAGES} shown was left out.]"
        if len(data) > IMAGE_LIMIT:
            size = f"{facts['bytes'] / 1e6:.1f} MB"
            return None, [facts], f"[An image of {size} was too large to show. Draw it smaller or with a lower dpi.]"
        return dict(create_image_block(base64=data, mime_type=mime_type)), [facts], ""

    table = as_markdown(result.html) if result.html else None
    text = table or result.text or result.markdown or result.latex or ""
    # A value such as a data frame reads well as text; an object whose text is only its name does not.
    if text and not text.startswith("<"):
        return None, [], text
    forms = {"HTML": result.html, "SVG": result.svg, "PDF": result.pdf, "JavaScript": result.javascript}
    hidden = [f"{name} of {len(form)} characters" for name, form in forms.items() if form]
    if hidden:
        text += f"\n[Not shown: {', '.join(hidden)}. Save it to a file, or draw it as PNG to see it.]"
    return None, [], text.lstrip("\n")


def _facts(data: str, mime_type: str) -> dict[str, Any] | None:
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None
    return {"mime_type": mime_type, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
