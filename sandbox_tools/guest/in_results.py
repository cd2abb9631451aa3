"""Runs inside each Python kernel: the data of frames and of charts, beside what they look like (PROTOCOL 3.2).

What libraries it needs it imports when there is something to show: a kernel that never plots pays nothing.
"""

from __future__ import annotations

import datetime
import math
import sys
import warnings
from typing import Any

from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode

CELLS = 200_000
"""Cells of a frame beyond which only its picture is sent: its data would cost seconds, and memory the code may need."""


class DataFormatter(BaseFormatter):  # type: ignore[misc]  # IPython is not typed
    """Frames as columns of plain values."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict


class ChartFormatter(BaseFormatter):  # type: ignore[misc]
    """Figures as what the package that E2B publishes for it finds in them."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def __call__(self, shown: Any) -> Any:
        """The data of what is shown. Not by its type, which matplotlib strikes off all formatters when it is set up."""
        module = sys.modules.get("matplotlib.figure")
        return chart(shown) if module and isinstance(shown, module.Figure) else super().__call__(shown)


def register(shell: Any) -> None:
    """Has the shell add the data to what it shows."""
    data, charts = (kind(parent=shell.display_formatter) for kind in (DataFormatter, ChartFormatter))
    data.for_type_by_name("pandas", "DataFrame", frame)
    data.for_type_by_name("pandas.core.frame", "DataFrame", frame)  # its name before pandas 3
    for formatter in (data, charts):
        shell.display_formatter.formatters[formatter.format_type] = formatter


def frame(table: Any) -> dict[str, list[Any]] | None:
    """The columns of a data frame by their names; None: it is too large."""
    if table.size > CELLS:
        return None

    columns = {}
    for number, name in enumerate(table.columns):
        column = table.iloc[:, number].astype(object)
        columns[str(name)] = plain(column.where(column.notna(), None).tolist())
    return columns


def chart(figure: Any) -> dict[str, Any] | None:
    """The data of a figure; None: it is empty, or of a kind that can't be read."""
    try:
        from e2b_charts import chart_figure_to_dict

        with warnings.catch_warnings():
            # It asks for an attribute that matplotlib is about to drop; its caller can do nothing about that.
            warnings.simplefilter("ignore")
            found: dict[str, Any] | None = plain(chart_figure_to_dict(figure)) or None
    except Exception:  # the picture is there all the same
        return None

    return found


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are none become None, dates ISO 8601, what is unknown its text."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)  # of an enumeration as well
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case dict():
            return {str(plain(key)): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return plain(value.item())

    return str(value)
