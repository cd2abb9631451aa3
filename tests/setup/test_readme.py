"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_first_example_is_the_text_of_the_quickstart() -> None:
    """`test_examples.py` runs that file."""
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)

    assert first
    assert first[1] == (REPOSITORY / "examples/quickstart.py").read_text(encoding="utf-8")


def test_the_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    named = set(re.findall(r"(?:`|^    )make ([a-z]+)", README, re.MULTILINE))

    assert {"demo", "test"} <= named <= targets


def test_the_files_it_names_exist() -> None:
    rooms = re.findall(r"`(\w+/)`: .* Open `(\w+\.py)`", README)

    assert len(rooms) == 6
    for room, file in rooms:
        assert (REPOSITORY / "sandbox_tools" / room / file).is_file(), file
    for example in re.findall(r"`(examples/\w+\.py)`", README):
        assert (REPOSITORY / example).is_file(), example
