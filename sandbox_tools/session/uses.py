"""Who uses a sandbox now: leases, turns and holds, each a row with an expiry."""

from __future__ import annotations

from collections.abc import Collection

from sandbox_tools.session.database import Connection
from sandbox_tools.session.notes import Notes
from sandbox_tools.session.queries import current_of, note_used, one, write_use
from sandbox_tools.session.rows import Binding, Hold

STALE = 86_400.0
"""Seconds after its expiry at which what a dead process left of a use is dropped."""

TAKEN_OVER = 100
"""How many neglected sandboxes one look finds at most."""


class Uses(Notes):
    """The part of `Bindings` that many may hold at once.

    Calls that name the same use take effect in the order in which they were made, even if their callers were cancelled.
    """

    async def begin_lease(
        self,
        owner: str,
        thread: str,
        handle: str,
        *,
        use: str,
        holder: str,
        now: float,
        until: float,
        ahead: bool = False,
    ) -> Binding | None:
        """Keep the sandbox from being paused until `until`; its idle period is over.

        `ahead`: it is only woken, for a tool call that may come.
        Returns:
            Its binding. None: it is in a transition or gone; look again.
        """
        where = "WHERE owner = :owner AND handle = :handle AND (holder IS NULL OR held_until <= :now)"

        def work(db: Connection) -> Binding | None:
            found = one(db, where + db.lock, owner=owner, handle=handle, now=now)
            if found is not None:
                write_use(db, use, "lease", holder, owner, thread, handle, until)
                note_used(db, handle, now, leased=not ahead)
            return found

        return await self._database.transact(work, key=use)

    async def begin_turn(self, owner: str, thread: str, *, use: str, holder: str, now: float, until: float) -> None:
        """Keep whatever sandbox the thread has, or gets, from being paused by a policy until `until`."""

        def work(db: Connection) -> None:
            write_use(db, use, "turn", holder, owner, thread, None, until)
            if (current := current_of(db, owner, thread)) is not None:
                note_used(db, current.handle, now, leased=False)

        await self._database.transact(work, key=use)

    async def hold(self, owner: str, thread: str, handle: str, *, use: str, pid: int | None, until: float) -> None:
        """Keep the sandbox from being paused by a policy until `until`, beyond this process; again: until then.

        Args:
            pid: The command for whose sake. None: somebody asked for a time.
        """
        await self._database.transact(
            lambda db: write_use(db, use, "hold", "", owner, thread, handle, until, pid), key=use
        )

    async def holds(self, handle: str, now: float) -> list[Hold]:
        """What holds the sandbox now."""
        statement = "SELECT id, pid, until FROM uses WHERE handle = :handle AND kind = 'hold' AND until > :now"
        return await self._database.transact(
            lambda db: [Hold(**row) for row in db.rows(statement, handle=handle, now=now)]
        )

    async def end_use(self, use: str, now: float) -> str | None:
        """End a lease, a turn or a hold, and let the idle time of its sandbox begin.

        Returns:
            The handle of that sandbox. None: there was no such use, or its thread has no sandbox.
        """

        def work(db: Connection) -> str | None:
            ended = db.rows("DELETE FROM uses WHERE id = :use RETURNING owner, thread, handle", use=use)
            if not ended:
                return None
            handle: str | None = ended[0]["handle"]
            if handle is None:
                current = current_of(db, ended[0]["owner"], ended[0]["thread"])
                handle = current.handle if current else None
            db.run(
                "UPDATE sandboxes SET idle_since = :now WHERE handle = :handle AND idle_since < :now",
                now=now,
                handle=handle,
            )
            return handle

        return await self._database.transact(work, key=use)

    async def renew(self, holder: str, *, transitions: Collection[str], now: float, until: float) -> None:
        """Prolong the uses of one registry and its transitions, and drop what dead ones left long ago.

        Args:
            transitions: The handles it is changing now. One whose end could not be written is not among them, and ends
                with its expiry.
        """
        going_on = "UPDATE sandboxes SET held_until = :until WHERE handle = :handle AND holder = :holder"

        def work(db: Connection) -> None:
            db.run("UPDATE uses SET until = :until WHERE holder = :holder", until=until, holder=holder)
            for handle in sorted(transitions):
                db.run(going_on, handle=handle, until=until, holder=holder)
            db.run("DELETE FROM uses WHERE until < :stale", stale=now - STALE)

        await self._database.transact(work)

    async def list_idle(self, before: float, now: float) -> list[str]:
        """The handles of what nobody uses and that should have been paused by then, as the process that was to is gone.

        One that died with a lease in hand had asked no policy yet: then it is what was not used since `before`. One
        that died in a create may have left what only a stamp tells of. What a command holds counts as in use until
        it is due to be asked after again.
        """
        statement = f"""
            SELECT handle FROM sandboxes
            WHERE state IN ('creating', 'running', 'frozen', 'unknown')
            AND (holder IS NULL OR held_until <= :now) AND coalesce(due_at, idle_since) <= :before
            AND NOT EXISTS (
                SELECT 1 FROM uses WHERE uses.handle = sandboxes.handle AND uses.until > :now AND uses.pid IS NULL)
            AND NOT EXISTS (
                SELECT 1 FROM uses JOIN threads USING (owner, thread)
                WHERE uses.handle IS NULL AND threads.handle = sandboxes.handle AND uses.until > :now)
            ORDER BY coalesce(due_at, idle_since) LIMIT {TAKEN_OVER}"""
        rows = await self._database.transact(lambda db: db.rows(statement, before=before, now=now))
        return [row["handle"] for row in rows]
