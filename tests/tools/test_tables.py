"""A data frame reaches the model as a table in markdown, or not as a table at all."""

from __future__ import annotations

import pandas as pd
import pytest

from sandbox_tools.tools.tables import CELL_LIMIT, as_markdown


def html_of(frame: pd.DataFrame) -> str:
    html = frame._repr_html_()
    assert html is not None
    return html


def test_a_frame_keeps_its_index_and_its_values() -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": ["x|y", "<z>"]})
    assert as_markdown(html_of(frame)) == ("|  | a | b |\n| --- | --- | --- |\n| 0 | 1 | x\\|y |\n| 1 | 2 | <z> |")


def test_a_named_index_names_its_column() -> None:
    frame = pd.DataFrame({"a": [1]}, index=pd.Index(["k"], name="id"))
    assert as_markdown(html_of(frame)) == "| id | a |\n| --- | --- |\n| k | 1 |"


def test_a_long_frame_says_how_long_it_is() -> None:
    shown = as_markdown(html_of(pd.DataFrame({"a": range(1000)})))
    assert shown is not None
    assert shown.endswith("\n\n1000 rows \u00d7 1 columns")
    assert "| ... | ... |" in shown


def test_a_long_cell_is_cut() -> None:
    with pd.option_context("display.max_colwidth", None):
        shown = as_markdown(html_of(pd.DataFrame({"a": ["x" * 1000]})))
    assert shown is not None
    assert "x" * (CELL_LIMIT - 3) + "..." in shown
    assert "x" * CELL_LIMIT not in shown


@pytest.mark.parametrize(
    "html",
    [
        "<b>bold</b>",
        "<table></table>",
        "<table><tr><td>1</td></tr></table><table><tr><td>2</td></tr></table>",
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td></tr></table>",
        html_of(pd.DataFrame({("a", "b"): [1], ("a", "c"): [2]})),
    ],
    ids=["no table", "empty", "two", "ragged", "two levels"],
)
def test_what_is_not_one_plain_grid_is_none(html: str) -> None:
    assert as_markdown(html) is None
