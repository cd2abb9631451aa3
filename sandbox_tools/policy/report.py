"""Shows what was saved, as a table and as a plot; only the command line needs it, and what it is drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.savings import Account, total

if TYPE_CHECKING:
    from rich.table import Table

DRAWN = 15
"""How many groups the plot shows one by one: those that would have cost most."""


def table(groups: Mapping[tuple[str, ...], Account]) -> Table:
    """A line for each group, and one for all.

    Args:
        groups: As `grouped` gives them.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    width = len(next(iter(groups), ("",)))
    title = "What sandboxes cost, in dollars, and what they would have"
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("owner", "thread", "sandbox")[:width]:
        made.add_column(column, overflow="fold", min_width=9)
    columns = ("running", "frozen", "paused", "pauses", "resumes", "waited", "spent", "5-min\ntimer", "always\non")
    for column in (*columns, "below\ntimer"):
        made.add_column(column, justify="right", no_wrap=True)
    for group, account in sorted(groups.items()):
        made.add_row(*group, *_cells(account))
    made.add_section()
    made.add_row("all", *[""] * (width - 1), *_cells(total(groups.values())), style="bold")
    return made


def _cells(account: Account) -> list[str]:
    times = (span(seconds) for seconds in (account.running, account.frozen, account.paused))
    dollars = (f"{usd:.4f}" for usd in (account.spent, account.timer, account.always_on))
    counts = (f"{account.pauses}", f"{account.resumes}", f"{account.waited:.1f} s")
    return [*times, *counts, *dollars, saved(account.spent, account.timer)]


def span(seconds: float) -> str:
    """A time in the largest unit of which there is at least one."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def saved(spent: float, otherwise: float) -> str:
    """The share of what it would have cost otherwise that was not spent; below 0 where more was."""
    return f"{1 - spent / otherwise:.1%}" if otherwise else "-"


def draw(groups: Mapping[tuple[str, ...], Account], path: Path) -> None:
    """Write a plot: for each group its dollars three ways, and how its time was spent.

    Args:
        groups: As `grouped` gives them.
        path: Its ending says how: `.png`, `.svg`, `.pdf`.

    Raises:
        ConfigError: The extra `plot` is not installed, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "The plot needs the extra `plot`. Install it: pip install 'sandbox-tools[plot]'"
        raise ConfigError(msg, op="savings") from error

    shown = sorted(groups.items(), key=lambda item: -item[1].always_on)
    rows = [(" / ".join(group), account) for group, account in shown[:DRAWN]]
    if rest := shown[DRAWN:]:
        rows.append((f"{len(rest)} others", total(account for _, account in rest)))
    rows.reverse()  # Bars are drawn from below.

    everything, places = total(groups.values()), range(len(rows))
    # A `Figure` of its own, without pyplot: that would choose a window system, and keep it for the process.
    figure = Figure(figsize=(12, 1.8 + 0.5 * len(rows)), layout="constrained")
    instead = f"${everything.timer:.2f} under a timer of 5 minutes, ${everything.always_on:.2f} always on"
    figure.suptitle(f"All sandboxes: ${everything.spent:.2f} instead of {instead}")
    dollars, times = figure.subplots(1, 2, sharey=True)
    bars = (("always on", "0.85", 0.8), ("5-min timer", "0.6", 0.5), ("spent", "tab:green", 0.25))
    for (label, color, height), name in zip(bars, ("always_on", "timer", "spent"), strict=True):
        values = [getattr(account, name) for _, account in rows]
        dollars.barh(places, values, height=height, color=color, label=label)
    dollars.set_yticks(places, [name for name, _ in rows])
    dollars.set_xlabel("dollars, by the provider's prices")
    left = [0.0] * len(rows)
    for name, color in (("running", "tab:orange"), ("frozen", "tab:cyan"), ("paused", "tab:blue")):
        shares = [
            100 * getattr(account, name) / ((account.running + account.frozen + account.paused) or 1.0)
            for _, account in rows
        ]
        times.barh(places, shares, left=left, height=0.6, color=color, label=name)
        left = [sum(both) for both in zip(left, shares, strict=True)]
    times.set_xlabel("% of the time")
    for panel in (dollars, times):
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        msg = f"Cannot write the plot to {str(path)!r}: {error}."
        raise ConfigError(msg, op="savings") from error
