"""Draws what a command shows in a terminal: `python docs/screenshot.py ps.png sandbox-tools ps` (needs Chromium)."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

COLUMNS = 110


def main(png: str, *command: str) -> None:
    """Run the command in a terminal of its own, and draw what stands in it afterwards."""
    said = _said(command)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {' '.join(command)}", style="bold"))
    console.print(Text.from_ansi(said))
    with tempfile.TemporaryDirectory() as directory:
        svg = Path(directory) / "terminal.svg"
        console.save_svg(str(svg), title="")
        head = svg.read_text().split('viewBox="0 0 ', 1)[1].split('"', 1)[0]
        width, height = (round(float(each)) for each in head.split())
        chromium = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
        subprocess.run(
            [*chromium, "--default-background-color=00000000", f"--screenshot={Path(png).absolute()}", svg.as_uri()],
            check=True,
            capture_output=True,
        )


def _said(command: tuple[str, ...]) -> str:
    terminal = pexpect.spawn(command[0], list(command[1:]), encoding="utf-8", dimensions=(40, COLUMNS))
    terminal.expect(pexpect.EOF)
    return str(terminal.before).replace("\r\n", "\n").strip("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
