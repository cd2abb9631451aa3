"""What bindings note for the policy and for the savings report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from sandbox_tools.policy.savings import Account, Change
from sandbox_tools.policy.tally import Tally
from sandbox_tools.session.rows import Ended

if TYPE_CHECKING:
    from sandbox_tools.session.database import Connection, Database, Row


TOOLLESS = 120.0
"""Seconds after which a turn that has called no tool is taken to call none."""


class Notes:
    """The part of `Bindings` that guards nothing."""

    _database: Database

    # Idle periods, until a policy learns from them.

    async def begin_idle(self, handle: str, *, owner: str, began: float, terms: str, threshold: float | None) -> None:
        """An idle period of the sandbox has begun, and this was planned for it; again for the same one: this, then.

        Args:
            terms: The key of what it costs, as `Terms.key` is.
        """
        statement = """
            INSERT INTO idles (handle, began, owner, terms, threshold)
            VALUES (:handle, :began, :owner, :terms, :threshold)
            ON CONFLICT (handle, began) DO UPDATE SET threshold = excluded.threshold, terms = excluded.terms"""
        values = {"handle": handle, "began": began, "owner": owner, "terms": terms, "threshold": threshold}
        await self._database.transact(lambda db: db.run(statement, **values))

    async def absorb(self, terms: str, *, began_before: float, learn: Callable[[Ended], Tally]) -> int:
        """Take out all idle periods under those terms that began before then, and add to the tallies what they teach.

        In one transaction: each teaches once, whichever process comes first.

        Args:
            learn: What one teaches.

        Returns:
            How many there were.
        """
        statement = """
            DELETE FROM idles WHERE terms = :terms AND began <= :before
            RETURNING owner, began, threshold, ended, lead, priced"""

        def work(db: Connection) -> int:
            periods = [_ended(row) for row in db.rows(statement, terms=terms, before=began_before)]
            taught: dict[str, Tally] = {}
            for period in periods:
                delta = learn(period)
                for owner in ("", period.owner):
                    taught[owner] = taught.get(owner, Tally()) + delta
            for owner in sorted(taught):  # In one order in all processes, so that none waits for another in a ring.
                _add(db, terms, owner, taught[owner])
            return len(periods)

        return await self._database.transact(work)

    async def price(self, terms: str, *, now: float, learn: Callable[[Ended], Tally]) -> int:
        """Add to the pool's tally what idle periods have cost that are over, each once; how many there were."""
        statement = """
            UPDATE idles SET priced = 1 WHERE terms = :terms AND priced = 0 AND ended IS NOT NULL
            AND (lead IS NOT NULL OR ended <= :late) RETURNING owner, began, threshold, ended, lead, priced"""

        def work(db: Connection) -> int:
            periods = [_ended(row) for row in db.rows(statement, terms=terms, late=now - TOOLLESS)]
            if periods:
                _add(db, terms, "", sum(map(learn, periods), Tally()))
            return len(periods)

        return await self._database.transact(work)

    async def tallies(self, owner: str, terms: str) -> tuple[Tally, Tally]:
        """What was learned under those terms: from all owners, and from this one."""
        return await self._database.transact(lambda db: (_tally(db, terms, ""), _tally(db, terms, owner)))

    # The savings report.

    async def record(self, handle: str, owner: str, thread: str, change: Change) -> tuple[str, float]:
        """Note what the sandbox does from now on, and what it has cost so far.

        Returns:
            What it did until now, and for how many seconds. Empty and 0: nothing was known of it.
        """

        def work(db: Connection) -> tuple[str, float]:
            rows = db.rows(f"SELECT account FROM accounts WHERE handle = :handle{db.lock}", handle=handle)
            before = Account(**json.loads(rows[0]["account"])) if rows else Account()
            after = before.after(change)
            db.run(
                """
                INSERT INTO accounts (handle, owner, thread, account) VALUES (:handle, :owner, :thread, :account)
                ON CONFLICT (handle) DO UPDATE SET account = excluded.account""",
                handle=handle,
                owner=owner,
                thread=thread,
                account=json.dumps(asdict(after)),
            )
            return before.state, after.since - before.since if before.state else 0.0

        return await self._database.transact(work)

    async def accounts(self, owner: str | None = None) -> list[tuple[str, str, str, Account]]:
        """The handle, owner, thread and account of each sandbox there was.

        Args:
            owner: Only this one's. None: all.
        """
        where = "" if owner is None else " WHERE owner = :owner"
        statement = f"SELECT handle, owner, thread, account FROM accounts{where} ORDER BY owner, thread, handle"
        rows = await self._database.transact(lambda db: db.rows(statement, owner=owner))
        return [(row["handle"], row["owner"], row["thread"], Account(**json.loads(row["account"]))) for row in rows]


def _ended(row: Row) -> Ended:
    return Ended(**{**row, "priced": bool(row["priced"])})


def _tally(db: Connection, terms: str, owner: str, lock: str = "") -> Tally:
    where = "WHERE terms = :terms AND owner = :owner"
    rows = db.rows(f"SELECT tally FROM tallies {where}{lock}", terms=terms, owner=owner)
    return Tally.from_bytes(bytes(rows[0]["tally"])) if rows else Tally()


def _add(db: Connection, terms: str, owner: str, delta: Tally) -> None:
    # The row is there before it is locked and read, or two that come first would each write its own.
    db.run(
        "INSERT INTO tallies (terms, owner, tally) VALUES (:terms, :owner, :tally) "
        "ON CONFLICT (terms, owner) DO NOTHING",
        terms=terms,
        owner=owner,
        tally=Tally().to_bytes(),
    )
    whole = _tally(db, terms, owner, db.lock) + delta
    db.run(
        "UPDATE tallies SET tally = :tally WHERE terms = :terms AND owner = :owner",
        terms=terms,
        owner=owner,
        tally=whole.to_bytes(),
    )
