"""A kernel's traceback without the frames of libraries that the user's code went through."""

from __future__ import annotations

import re

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

# How IPython begins a frame, and the numbered lines of source that follow.
_FRAME = re.compile(r"(?:File .+:\d+|Cell In\[\d+\], line \d+)(?:, in .*)?$")
_SOURCE = re.compile(r"(?:-*> ?| +)(?:\d+\b|\(\.\.\.\))")
_LIBRARY = re.compile(r"File (?:/usr/(?:local/)?lib/|[^/]|.*/(?:site|dist)-packages/)")


def trimmed(traceback: str) -> str:
    """The frames of the user's own code, with a line for those of libraries between and below them; no colours."""
    kept: list[str] = []
    skipped = 0
    inside = library = False
    for line in COLOURS.sub("", traceback).splitlines():
        if _FRAME.match(line):
            inside, library = True, _LIBRARY.match(line) is not None
            skipped += library
        elif inside and line and not _SOURCE.match(line):
            inside = library = False
        if library:
            continue
        if skipped:
            frames = "1 frame" if skipped == 1 else f"{skipped} frames"
            kept += [f"[{frames} of libraries left out]", *([] if inside else [""])]
            skipped = 0
        kept.append(line)
    return "\n".join(kept)
