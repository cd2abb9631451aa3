"""A data frame's HTML as a table in markdown, which models read better than columns of blanks."""

from __future__ import annotations

import re
from html.parser import HTMLParser

CELL_LIMIT = 200
"""Characters of one cell."""


def as_markdown(html: str) -> str | None:
    """The one table in `html`, with its index and what is said below it; None where it isn't one plain grid."""
    if html.count("<table") != 1 or re.search(r"(row|col)span", html):
        return None

    parser = _Table()
    parser.feed(html)
    parser.close()
    head, *rows = [row for row in parser.rows if row] or [[]]
    # A named index has a line of its own below the column names.
    if rows and len(head) > 1 and not head[0] and rows[0][0] and not any(rows[0][1:]):
        head[0] = rows.pop(0)[0]
    if not rows or any(len(row) != len(head) for row in rows):
        return None

    lines = [head, ["---"] * len(head), *rows]
    below = f"\n\n{parser.below.strip()}" if parser.below.strip() else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + below


class _Table(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.below = ""
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag in ("td", "th", "p", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside or self._inside[-1] == "style":
            return
        if self._inside[-1] == "p":
            self.below += data
        elif self.rows and self.rows[-1]:
            text = self.rows[-1][-1] + " ".join(data.split()).replace("|", "\\|")
            self.rows[-1][-1] = text if len(text) <= CELL_LIMIT else text[: CELL_LIMIT - 3] + "..."
