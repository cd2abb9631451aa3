"""The savings report: what sandboxes have cost beside what they would have cost, as a table, as JSON, as a plot."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.savings import SUMMED, Account, total
from sandbox_tools.session.bindings import PostgresBindings, SqliteBindings

By = Literal["all", "owner", "thread", "sandbox"]

Rows = dict[str, Account]
"""Sums by what is said of them; the last is of all."""

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was saved against something else, in dollars and as a share of it (0 where that cost nothing)."""

    dollars: float
    share: float


def saved(spent: float, otherwise: float) -> Saved:
    """What spending `spent` saves against spending `otherwise`; both in dollars."""
    return Saved(dollars=otherwise - spent, share=1 - spent / otherwise if otherwise else 0.0)


async def read(place: str | Path, *, by: By = "owner", owner: str | None = None) -> Rows:
    """The accounts in bindings, as they stand now.

    Args:
        place: A SQLite file, or a Postgres database as `PostgresBindings` takes it.
        owner: Only this one's sandboxes. None: all.

    Raises:
        ConfigError: There is no such file.
    """
    if str(place).startswith(("postgres:", "postgresql:")) or "dbname=" in str(place):
        bindings: PostgresBindings | SqliteBindings = PostgresBindings(str(place))
    elif not Path(place).exists():
        msg = f"There are no bindings at {str(place)!r}: no session has run here. Name others with `--bindings`."
        raise ConfigError(msg, op="savings")
    else:
        bindings = SqliteBindings(place)
    try:
        accounts = await bindings.accounts(owner)
    finally:
        await bindings.aclose()
    now = time.time()
    groups: dict[str, list[Account]] = {}
    for handle, whose, thread, account in accounts:
        name = {
            "all": ALL,
            "owner": whose,
            "thread": f"{whose} / {thread}",
            "sandbox": f"{whose} / {thread} / {handle}",
        }
        groups.setdefault(name[by], []).append(account.until(now))
    rows = {name: total(group) for name, group in groups.items()}
    return {name: row for name, row in rows.items() if name != ALL} | {ALL: total(rows.values())}


def as_json(rows: Rows) -> dict[str, dict[str, float]]:
    """Plain numbers: seconds, dollars, counts."""
    return {
        name: {
            **{field: getattr(row, field) for field in SUMMED},
            "saved_against_always_on": saved(row.spent, row.always_on).dollars,
            "saved_against_timer": saved(row.spent, row.timer).dollars,
        }
        for name, row in rows.items()
    }


def table(rows: Rows) -> object:
    """What `rich` prints."""
    from rich.table import Table

    shown = Table(title="what sandboxes cost, and what they would have cost", title_justify="left")
    columns = ("", "running", "frozen", "paused", "pauses", "resumes", "waited", "spent", "always on", "5-min timer")
    for column in columns:
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        shown.add_row(
            name,
            *(_spell(seconds) for seconds in (row.running, row.frozen, row.paused)),
            str(row.pauses),
            str(row.resumes),
            _spell(row.waited),
            f"${row.spent:.4f}",
            *(_compared(row.spent, otherwise) for otherwise in (row.always_on, row.timer)),
            style="bold" if name == ALL and len(rows) > 1 else None,
        )
    return shown


def plot(rows: Rows, path: Path) -> None:
    """Draw dollars spent beside the two alternatives, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        msg = "The plot needs matplotlib. Install it: pip install 'sandbox-tools[plot]'."
        raise ConfigError(msg, op="savings") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in rows if name != ALL] or [ALL]
    figure, panel = pyplot.subplots(figsize=(8, 1.5 + 0.6 * len(names)))
    bars = (("spent", "tab:green"), ("timer", "tab:orange"), ("always_on", "0.7"))
    labels = {"spent": "spent", "timer": "with a 5-minute timer", "always_on": "always on"}
    for offset, (field, colour) in zip((-0.27, 0.0, 0.27), bars, strict=True):
        values = [getattr(rows[name], field) for name in names]
        panel.barh([number + offset for number in range(len(names))], values, 0.25, color=colour, label=labels[field])
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("dollars")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _compared(spent: float, otherwise: float) -> str:
    return f"${otherwise:.4f} ({saved(spent, otherwise).share:+.0%})"


def _spell(seconds: float) -> str:
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
