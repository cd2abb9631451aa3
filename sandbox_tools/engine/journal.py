"""What happened to each sandbox, as lines that its owner can read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

Level = Literal["debug", "info", "warn", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warn", "error")
"""From the least to the most serious."""

_FILE = "journal.jsonl"

# A line is some 150 bytes: a thousand and more of them.
_MOST_BYTES = 256 << 10

log = logging.getLogger(__name__)


class Line(BaseModel):
    """One line."""

    at: datetime
    level: Level
    message: str
    fields: dict[str, str] = {}


class Journal:
    """The lines of all sandboxes, each in its sandbox's directory, with which they go.

    Args:
        directory: Where the sandboxes' directories are.
        now: The wall clock.
    """

    def __init__(self, directory: Path, *, now: Callable[[], datetime]) -> None:
        self._directory = directory
        self._now = now

    def note(self, sandbox_id: str, message: str, *, level: Level = "info", **fields: str) -> None:
        """Add a line. A line that can't be written is lost, and nothing else."""
        path = self._path(sandbox_id)
        line = Line(at=self._now(), level=level, message=message, fields=fields)
        try:
            if path.exists() and path.stat().st_size > _MOST_BYTES:
                kept = path.read_bytes()[-_MOST_BYTES // 2 :].partition(b"\n")[2]
                path.write_bytes(kept)
            with path.open("a", encoding="utf-8") as file:
                file.write(line.model_dump_json() + "\n")
        except OSError as error:
            log.warning("A line of sandbox %s's journal could not be written: %s", sandbox_id, error)

    def lines(self, sandbox_id: str) -> list[Line]:
        """Oldest first; empty where there are none."""
        found = []
        with contextlib.suppress(OSError):
            for text in self._path(sandbox_id).read_bytes().splitlines():
                with contextlib.suppress(ValidationError):  # one that a crash or a full disk has cut
                    found.append(Line.model_validate_json(text))
        return found

    def _path(self, sandbox_id: str) -> Path:
        return self._directory / sandbox_id / _FILE
