"""Remembers which sandbox a conversation has and who uses it now, as plain rows that processes share.

Two facts guard a sandbox. A *use* is shared: a lease (one tool call in flight), an open turn, or a hold, each a row
with an expiry; those of a process it renews. A *transition* (create, pause, kill) is exclusive: its holder and fence
stand in the sandbox's own row. A lease is refused while a transition is under way and a pause while a lease is alive,
each in one transaction, so no two processes can disagree. A write after a transition carries its fence: a holder that
slept past its expiry changes nothing. Times are the callers', in seconds since the epoch: the clocks of hosts that
share a database must agree within a few seconds, against expiries of a minute.
"""

from __future__ import annotations

from pathlib import Path

from sandbox_tools.session.database import Connection, Database, PostgresDatabase, SqliteDatabase
from sandbox_tools.session.notes import Notes
from sandbox_tools.session.queries import (
    binding_in,
    current_of,
    insert_binding,
    many,
    note_lost,
    note_used,
    one,
    write_pointer,
    write_use,
)
from sandbox_tools.session.rows import COLUMNS, Binding, Hint, Hold, Unless, new_handle

STALE = 86_400.0
"""Seconds after its expiry at which what a dead process left of a use is dropped."""

TAKEN_OVER = 100
"""How many neglected sandboxes one look finds at most."""


class Bindings(Notes):
    """All of it, over one database; `SqliteBindings` and `PostgresBindings` name it.

    Calls that have begun run to their end, even if their caller is cancelled: whoever may be cancelled therefore names
    what it takes (a use's `id`) before it asks.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transact = database.transact

    async def aclose(self) -> None:
        """Close the database; calls already made are finished first."""
        await self._database.aclose()

    # Which thread has which sandbox.

    async def current(self, owner: str, thread: str, now: float, *, sensitive: bool = False) -> Binding:
        """The thread's binding; a new one, with a new handle, if it has none.

        Args:
            sensitive: Of a new one.
        """

        def work(db: Connection) -> Binding:
            db.run(
                "INSERT INTO threads (owner, thread) VALUES (:owner, :thread) ON CONFLICT (owner, thread) DO NOTHING",
                owner=owner,
                thread=thread,
            )
            db.rows(
                f"SELECT 1 FROM threads WHERE owner = :owner AND thread = :thread{db.lock}", owner=owner, thread=thread
            )
            found = current_of(db, owner, thread)
            return found or insert_binding(db, owner, thread, new_handle(), now, sensitive=sensitive)

        return await self._transact(work)

    async def find(self, owner: str, thread: str) -> Binding | None:
        """The thread's binding. None: it has none."""
        return await self._transact(lambda db: current_of(db, owner, thread))

    async def get(self, handle: str) -> Binding | None:
        """The binding of that handle, whosever it is. None: there is none."""
        return await self._transact(lambda db: one(db, "WHERE handle = :handle", handle=handle))

    async def by_handle(self, owner: str, handle: str) -> Binding | None:
        """The owner's binding of that handle. None: there is none, or it is another owner's."""
        where = "WHERE owner = :owner AND handle = :handle"
        return await self._transact(lambda db: one(db, where, owner=owner, handle=handle))

    async def of_owner(self, owner: str) -> list[Binding]:
        """All of an owner's bindings."""
        return await self._transact(lambda db: many(db, "WHERE owner = :owner", owner=owner))

    async def point(self, owner: str, thread: str, handle: str | None) -> None:
        """Make a sandbox the thread's current one. None: it has none then, and gets another at its next use."""
        await self._transact(lambda db: write_pointer(db, owner, thread, handle))

    async def adopt(
        self,
        owner: str,
        thread: str,
        handle: str,
        *,
        sandbox_id: str,
        state: Hint,
        sensitive: bool,
        now: float,
    ) -> bool:
        """Bind a sandbox that was found by its stamp, and whose binding was lost; False: it is bound already.

        A thread that has no sandbox, or one that was never made, has it as its own then.
        """

        def work(db: Connection) -> bool:
            bound = one(db, "WHERE handle = :handle OR sandbox_id = :id", handle=handle, id=sandbox_id)
            if bound is not None:
                return False
            before = current_of(db, owner, thread)
            if before is not None and before.state == "new":
                db.run("DELETE FROM sandboxes WHERE handle = :handle AND state = 'new'", handle=before.handle)
                before = None
            insert_binding(db, owner, thread, handle, now, sensitive=sensitive, point=before is None)
            db.run(
                "UPDATE sandboxes SET sandbox_id = :id, state = :state WHERE handle = :handle",
                id=sandbox_id,
                state=state,
                handle=handle,
            )
            return True

        return await self._transact(work)

    # Uses.

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

        return await self._transact(work)

    async def begin_turn(self, owner: str, thread: str, *, use: str, holder: str, now: float, until: float) -> None:
        """Keep whatever sandbox the thread has, or gets, from being paused by a policy until `until`."""

        def work(db: Connection) -> None:
            write_use(db, use, "turn", holder, owner, thread, None, until)
            if (current := current_of(db, owner, thread)) is not None:
                note_used(db, current.handle, now, leased=False)

        await self._transact(work)

    async def hold(self, owner: str, thread: str, handle: str, *, use: str, pid: int | None, until: float) -> None:
        """Keep the sandbox from being paused by a policy until `until`, beyond this process; again: until then.

        Args:
            pid: The command for whose sake. None: somebody asked for a time.
        """
        await self._transact(lambda db: write_use(db, use, "hold", "", owner, thread, handle, until, pid))

    async def holds(self, handle: str, now: float) -> list[Hold]:
        """What holds the sandbox now."""
        statement = "SELECT id, pid, until FROM uses WHERE handle = :handle AND kind = 'hold' AND until > :now"
        return await self._transact(lambda db: [Hold(**row) for row in db.rows(statement, handle=handle, now=now)])

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

        return await self._transact(work)

    async def renew(self, holder: str, *, now: float, until: float) -> None:
        """Prolong all uses and transitions of one registry, and drop what dead ones left long ago."""

        def work(db: Connection) -> None:
            db.run("UPDATE uses SET until = :until WHERE holder = :holder", until=until, holder=holder)
            db.run("UPDATE sandboxes SET held_until = :until WHERE holder = :holder", until=until, holder=holder)
            db.run("DELETE FROM uses WHERE until < :stale", stale=now - STALE)

        await self._transact(work)

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
        rows = await self._transact(lambda db: db.rows(statement, before=before, now=now))
        return [row["handle"] for row in rows]

    # Transitions.

    async def begin_transition(
        self, handle: str, *, holder: str, now: float, until: float, unless: Unless
    ) -> Binding | None:
        """Take the exclusive right to change what the handle stands for.

        Returns:
            The binding with its new fence. None: gone, in another transition, or in use as `unless` forbids.
        """
        statement = f"""
            UPDATE sandboxes SET fence = fence + 1, holder = :holder, held_until = :until
            WHERE handle = :handle AND (holder IS NULL OR held_until <= :now)
            AND (:unless = 'nothing' OR NOT EXISTS (
                SELECT 1 FROM uses WHERE uses.handle = :handle AND uses.until > :now
                AND (uses.kind = 'lease' OR :unless = 'used')))
            AND (:unless <> 'used' OR NOT EXISTS (
                SELECT 1 FROM uses JOIN threads USING (owner, thread)
                WHERE uses.handle IS NULL AND threads.handle = :handle AND uses.until > :now))
            RETURNING {COLUMNS}"""

        def work(db: Connection) -> Binding | None:
            # Whoever begins a lease has locked this row before: once it is ours, what it has written is seen.
            db.rows(f"SELECT 1 FROM sandboxes WHERE handle = :handle{db.lock}", handle=handle)
            rows = db.rows(statement, handle=handle, holder=holder, now=now, until=until, unless=unless)
            return binding_in(rows[0]) if rows else None

        return await self._transact(work)

    async def write(self, held: Binding, *, state: Hint, sandbox_id: str | None, awake_until: float = 0) -> bool:
        """Note what the server was asked or has answered, the transition going on. False: the fence has passed."""
        return await self._write(held, "", state, sandbox_id, awake_until, held.due_at)

    async def end_transition(
        self,
        held: Binding,
        *,
        state: Hint,
        sandbox_id: str | None,
        awake_until: float = 0,
        due_at: float | None = None,
    ) -> bool:
        """Note the outcome and let others in. False: the fence has passed, nothing was written."""
        more = ", holder = NULL, held_until = 0"
        return await self._write(held, more, state, sandbox_id, awake_until, due_at)

    async def _write(
        self, held: Binding, more: str, state: Hint, sandbox_id: str | None, awake_until: float, due_at: float | None
    ) -> bool:
        statement = f"""
            UPDATE sandboxes SET sandbox_id = :sandbox_id, state = :state, awake_until = :awake_until,
            due_at = :due_at{more} WHERE handle = :handle AND fence = :fence"""
        values = {"sandbox_id": sandbox_id, "state": state, "awake_until": awake_until, "due_at": due_at}
        return await self._transact(
            lambda db: db.run(statement, handle=held.handle, fence=held.fence, **values) == 1,
        )

    async def mark(self, held: Binding, sentinel: str | None) -> bool:
        """Note what was left in the sandbox to be looked for, the transition going on. False: the fence has passed."""
        statement = "UPDATE sandboxes SET sentinel = :sentinel WHERE handle = :handle AND fence = :fence"
        return await self._transact(
            lambda db: db.run(statement, sentinel=sentinel, handle=held.handle, fence=held.fence) == 1
        )

    async def abandon(self, held: Binding) -> None:
        """End the transition if it has not been ended; what was running then may be running still."""
        statement = """
            UPDATE sandboxes SET holder = NULL, held_until = 0,
            state = CASE WHEN state IN ('running', 'frozen') THEN 'unknown' ELSE state END
            WHERE handle = :handle AND fence = :fence AND holder IS NOT NULL"""
        await self._transact(lambda db: db.run(statement, handle=held.handle, fence=held.fence))

    async def note(self, held: Binding, *, state: Hint, awake_until: float) -> None:
        """Note what was seen of the sandbox under a lease, where no transition is needed to see it."""
        statement = """
            UPDATE sandboxes SET state = :state, awake_until = :awake_until
            WHERE handle = :handle AND sandbox_id = :sandbox_id"""
        values = {"state": state, "awake_until": awake_until, "handle": held.handle, "sandbox_id": held.sandbox_id}
        await self._transact(lambda db: db.run(statement, **values))

    async def forget(self, held: Binding, *, lost: bool) -> bool:
        """Drop the binding in a transition; its threads have no sandbox then.

        Args:
            lost: Whether its threads are to be told, once, that their state was lost.

        Returns:
            False: the fence has passed, nothing was dropped.
        """
        statement = "DELETE FROM sandboxes WHERE handle = :handle AND fence = :fence"

        def work(db: Connection) -> bool:
            if db.run(statement, handle=held.handle, fence=held.fence) == 0:
                return False
            if lost:
                note_lost(db, held.handle, {"sandbox"})
            db.run("UPDATE threads SET handle = NULL WHERE handle = :handle", handle=held.handle)
            db.run("DELETE FROM uses WHERE handle = :handle AND kind = 'hold'", handle=held.handle)
            return True

        return await self._transact(work)

    # What was lost.

    async def note_lost(self, handle: str, *lost: str) -> None:
        """Have the threads that use the sandbox be told, once, that this of its state was lost."""
        await self._transact(lambda db: note_lost(db, handle, set(lost)))

    async def take_lost(self, owner: str, thread: str) -> frozenset[str]:
        """What the thread has lost since it was last asked; each loss is told once.

        Returns:
            `"sandbox"`, or `"memory"` or `"files"` where it woke without. Empty: nothing.
        """
        where = "WHERE owner = :owner AND thread = :thread AND losses <> ''"

        def work(db: Connection) -> frozenset[str]:
            rows = db.rows(f"SELECT losses FROM threads {where}{db.lock}", owner=owner, thread=thread)
            if not rows:
                return frozenset()
            db.run(f"UPDATE threads SET losses = '' {where}", owner=owner, thread=thread)
            return frozenset(rows[0]["losses"].split(","))

        return await self._transact(work)


class SqliteBindings(Bindings):
    """Bindings in one SQLite file on a local disk (not NFS), for the processes of one host.

    Args:
        path: The database file; it is made on first use, with its directory, for this user only.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(SqliteDatabase(path))
        self.path = path


class MemoryBindings(SqliteBindings):
    """Bindings that end with the process, and that no other process sees."""

    def __init__(self) -> None:
        super().__init__(":memory:")


class PostgresBindings(Bindings):
    """Bindings in a Postgres database, for many hosts; its tables are made on first use, in the default schema.

    Args:
        place: As libpq takes it: `postgresql://user@host/name`.
        connections: How many this process opens at most; calls beyond wait for each other.

    Raises:
        ConfigError: The extra `postgres` is not installed.
    """

    def __init__(self, place: str, *, connections: int = 4) -> None:
        super().__init__(PostgresDatabase(place, connections=connections))
