"""The house stays as DESIGN draws it: imports point down, and no file grows into two rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandbox_tools

PACKAGE = Path(sandbox_tools.__file__).parent

ROOMS = ("tools", "session", "policy", "client", "engine", "guest")

# What each room may import besides itself and what all share.
BELOW = {
    "tools": {"session", "policy", "client"},
    "session": {"policy", "client"},
    "policy": set(),
    "client": set(),  # nothing of the engine: the two meet on the wire
    "engine": {"guest"},
    "guest": set(),
}
SHARED = {"errors", "models", "paths", "telemetry"}


def imported_rooms(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "sandbox_tools":
            names = [f"sandbox_tools.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("sandbox_tools."):
                yield name.split(".")[1]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    allowed = BELOW[room] | {room} | (SHARED if room != "guest" else set())
    for file in (PACKAGE / room).rglob("*.py"):
        assert set(imported_rooms(file)) <= allowed, file


def test_what_all_rooms_share_knows_none_of_them() -> None:
    for name in SHARED:
        assert not set(imported_rooms(PACKAGE / f"{name}.py")) & set(ROOMS)


def test_no_file_is_two_rooms() -> None:
    long = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
