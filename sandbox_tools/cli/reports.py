"""What sandboxes have cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sandbox_tools.cli.common import as_json, console, show, state_dir
from sandbox_tools.errors import ConfigError
from sandbox_tools.policy.savings import SUMMED, Ledger, grouped


@click.command()
@click.option(
    "--bindings",
    multiple=True,
    metavar="PLACE",
    help="An SQLite file, or postgresql://...; may be repeated.  [default: all files in the state directory]",
)
@click.option("--owner", help="Only of this one.")
@click.option("--by", type=click.Choice(("sandbox", "thread", "owner")), default="owner", show_default=True)
@click.option(
    "--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw a plot here (needs the extra `plot`)."
)
@as_json
@state_dir
def savings(
    state_dir: Path, bindings: Sequence[str], owner: str | None, by: Any, png: Path | None, as_json: bool
) -> None:
    """Show what sandboxes cost, and what they would have without pauses."""
    places = list(bindings) or sorted(map(str, state_dir.glob("sessions*.db")))
    ledger = asyncio.run(_accounts(places, owner))
    if not ledger:
        words = f"of the owner {owner!r} " if owner else ""
        msg = f"No sandbox {words}is on record in {', '.join(places) or str(state_dir)}."
        raise ConfigError(msg, op="savings")

    groups = grouped(ledger, by, time.time())
    if as_json:
        keys = ("owner", "thread", "sandbox")
        show(
            [
                dict(zip(keys, group, strict=False))
                | {name: getattr(account, name) for name in SUMMED}
                | {f"saved_against_{name}": getattr(account, name) - account.spent for name in ("timer", "always_on")}
                for group, account in sorted(groups.items())
            ]
        )
    else:
        shown = console()
        from sandbox_tools.policy import report

        shown.print(report.table(groups))
    if png:
        from sandbox_tools.policy import report

        report.draw(groups, png)


async def _accounts(places: Sequence[str], owner: str | None) -> Ledger:
    from sandbox_tools.session.bindings import Bindings, PostgresBindings, SqliteBindings

    found: Ledger = []
    for place in places:
        postgres = place.startswith(("postgres://", "postgresql://")) or "dbname=" in place
        if not postgres and not Path(place).is_file():
            msg = f"There is no file {place!r}. Name one that `SqliteBindings` has written."
            raise ConfigError(msg, op="savings")
        bindings: Bindings = PostgresBindings(place, connections=1) if postgres else SqliteBindings(place)
        try:
            found += await bindings.accounts(owner)
        finally:
            await bindings.aclose()
    return found
