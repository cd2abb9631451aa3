"""Every kind of result, from what code shows to the fields that the SDKs read (PROTOCOL 3.2)."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from .conftest import Guest, of_type

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHART_2D = {"x_label", "y_label", "x_unit", "y_unit"}
POINTS = CHART_2D | {"x_ticks", "x_tick_labels", "x_scale", "y_ticks", "y_tick_labels", "y_scale"}
ALL = {"type", "title", "elements"}


def box(label: str, *numbers: float) -> dict[str, Any]:
    """One box without outliers."""
    names = ("min", "first_quartile", "median", "third_quartile", "max")
    return {"label": label, **dict(zip(names, numbers, strict=True)), "outliers": []}


async def shown(guest: Guest, code: str) -> dict[str, Any]:
    """The one result of code."""
    events = await guest.run(code)
    assert of_type(events, "error") == []
    (result,) = of_type(events, "result")
    return result


async def plotted(guest: Guest, code: str) -> dict[str, Any]:
    """The chart of code that plots; its picture is there as well."""
    result = await shown(guest, f"import matplotlib.pyplot as plt\n{code}\nplt.show()")
    assert base64.b64decode(result["png"], validate=True).startswith(b"\x89PNG")
    chart: dict[str, Any] = result["chart"]
    return chart


@pytest.mark.parametrize(
    ("shows", "field", "value"),
    [
        ("HTML('<b>')", "html", "<b>"),
        ("Markdown('# x')", "markdown", "# x"),
        ("SVG('<svg/>')", "svg", "<svg/>"),
        ("Latex('$x$')", "latex", "$x$"),
        ("Javascript('f()')", "javascript", "f()"),
        ("JSON({'a': [1, None]})", "json", {"a": [1, None]}),
        ("Image(b'\\x89PNG\\r\\n\\x1a\\n' + bytes(24), format='png')", "png", None),
        ("Image(b'\\xff\\xd8\\xff' + bytes(24), format='jpeg')", "jpeg", None),
    ],
)
async def test_what_ipython_can_show_has_its_field(guest: Guest, shows: str, field: str, value: Any) -> None:
    result = await shown(guest, f"from IPython.display import *\n{shows}")

    assert result["is_main_result"] is True
    if value is None:
        assert base64.b64decode(result[field], validate=True)
    else:
        assert result[field] == value


async def test_a_pdf_is_one_too(guest: Guest) -> None:
    code = "class Paper:\n    def _repr_pdf_(self): return b'%PDF-1.7'\nPaper()"

    assert base64.b64decode((await shown(guest, code))["pdf"]) == b"%PDF-1.7"


async def test_a_data_frame_is_text_html_and_columns_of_plain_values(guest: Guest) -> None:
    """What JSON cannot hold becomes null, or its text; numpy's and pandas' own types become plain ones."""
    code = """
import datetime, decimal, numpy, pandas
pandas.DataFrame({
    "int": numpy.array([1, 2], dtype="int8"), "float": [0.5, float("inf")], "none": [None, float("nan")],
    "text": ["a", None], 3: [True, False], "time": pandas.to_datetime(["2026-01-02", None]),
    "day": [datetime.date(2026, 1, 2), pandas.NA], "class": pandas.Categorical(["u", "v"]),
    "other": [decimal.Decimal("1.5"), [1, numpy.float64(2)]],
})
"""
    result = await shown(guest, code)

    assert "<table" in result["html"]
    assert "float" in result["text"]
    assert result["data"] == {
        "int": [1, 2],
        "float": [0.5, None],
        "none": [None, None],
        "text": ["a", None],
        "3": [True, False],
        "time": ["2026-01-02T00:00:00", None],
        "day": ["2026-01-02", None],
        "class": ["u", "v"],
        "other": ["1.5", [1, 2.0]],
    }


async def test_a_frame_that_is_too_large_is_shown_without_its_data(guest: Guest) -> None:
    result = await shown(guest, "import pandas\npandas.DataFrame({'a': range(200_001)})")

    assert "html" in result
    assert "data" not in result


async def test_an_object_says_its_own_data_and_chart(guest: Guest) -> None:
    code = """
class Own:
    def _repr_e2b_data_(self): return {"a": [1]}
    def _repr_e2b_chart_(self): return {"type": "unknown", "title": None, "elements": []}
Own()
"""
    result = await shown(guest, code)

    assert result["data"] == {"a": [1]}
    assert result["chart"] == {"type": "unknown", "title": None, "elements": []}


async def test_a_line_chart_has_its_points_labels_units_and_scales(guest: Guest) -> None:
    """Every key that the SDK's `LineChart` demands."""
    chart = await plotted(
        guest,
        "plt.plot([1, 2], [3, float('nan')], label='l'); plt.xlabel('t (s)'); plt.ylabel('d [m]')\n"
        "plt.title('T'); plt.yscale('log')",
    )

    assert chart.keys() == ALL | POINTS
    assert (chart["type"], chart["title"], chart["x_unit"], chart["y_unit"]) == ("line", "T", "s", "m")
    assert (chart["x_scale"], chart["y_scale"]) == ("linear", "log")
    assert chart["elements"] == [{"label": "l", "points": [[1.0, 3.0], [2.0, None]]}]


async def test_a_chart_over_time_has_dates(guest: Guest) -> None:
    chart = await plotted(guest, "import datetime\nplt.plot([datetime.date(2026, 1, day) for day in (1, 2)], [3, 4])")

    assert chart["x_scale"] == "datetime"
    assert chart["elements"][0]["points"][0] == ["2026-01-01", 3.0]


@pytest.mark.parametrize(
    ("code", "kind", "keys", "elements"),
    [
        ("plt.scatter([1], [2], label='s')", "scatter", POINTS, [{"label": "s", "points": [[1.0, 2.0]]}]),
        (
            "plt.bar(['a', 'b'], [3, 5], label='g')",
            "bar",
            CHART_2D,
            [{"label": "a", "group": "g", "value": 3.0}, {"label": "b", "group": "g", "value": 5.0}],
        ),
        (
            "plt.pie([1, 3], labels=['a', 'b'])",
            "pie",
            set(),
            [{"label": "a", "angle": 90.0, "radius": 1.0}, {"label": "b", "angle": 270.0, "radius": 1.0}],
        ),
        (
            "plt.boxplot([[85, 90, 78, 92, 88], [95, 89, 76, 91, 84]], tick_labels=['b', 'c'], patch_artist=True)",
            "box_and_whisker",
            CHART_2D,
            [box("b", 78.0, 85.0, 88.0, 90.0, 92.0), box("c", 76.0, 84.0, 89.0, 91.0, 95.0)],
        ),
        ("plt.imshow([[1, 2]])", "unknown", set(), []),
    ],
)
async def test_each_kind_of_chart_has_its_elements(
    guest: Guest, code: str, kind: str, keys: set[str], elements: list[Any]
) -> None:
    chart = await plotted(guest, code)

    assert chart["type"] == kind
    assert chart.keys() == ALL | keys
    assert chart["elements"] == elements


async def test_several_axes_are_a_superchart(guest: Guest) -> None:
    chart = await plotted(
        guest, "figure, (left, right) = plt.subplots(1, 2); left.plot([1]); right.bar(['a'], [1]); plt.suptitle('S')"
    )

    assert (chart["type"], chart["title"]) == ("superchart", "S")
    assert [each["type"] for each in chart["elements"]] == ["line", "bar"]


async def test_a_figure_that_cannot_be_read_or_is_empty_is_still_shown(guest: Guest) -> None:
    """The package that reads charts fails at a box without a whisker; nothing of that reaches the output."""
    code = "import matplotlib.pyplot as plt\n{}\nplt.show()"
    for plot, picture in (("plt.boxplot([[1, 1]], patch_artist=True)", True), ("plt.figure()", False)):
        events = await guest.run(code.format(plot))
        (result,) = of_type(events, "result")
        assert "chart" not in result
        assert ("png" in result) is picture
        assert of_type(events, "stderr") == []


async def test_a_kernel_that_never_plots_loads_nothing_for_it(guest: Guest) -> None:
    context = await guest.context()
    loaded = "import sys\nsorted({'pandas', 'matplotlib', 'e2b_charts', 'pydantic'} & set(sys.modules))"

    assert await guest.value(loaded, context_id=context) == "[]"
    await guest.http.delete(f"/contexts/{context}")
