"""Remembers which sandbox a conversation has and who uses it now, as plain rows that processes share.

Two facts guard a sandbox. A *use* is shared: a lease (one tool call in flight), an open turn, or a hold, each a row
with an expiry; those of a process it renews. A *transition* (create, pause, kill) is exclusive: its holder and fence
stand in the sandbox's own row. A lease is refused while a transition is under way and a pause while a lease is alive,
each in one transaction, so no two processes can disagree. A write after a transition carries its fence: a holder that
slept past its expiry changes nothing. Times are the callers', in seconds since the epoch: the clocks of hosts that
share a database must agree within a few seconds, against expiries of a minute.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from sandbox_tools.session.database import Connection, Database, SqliteDatabase
from sandbox_tools.session.postgres import PostgresDatabase
from sandbox_tools.session.queries import (
    binding_in,
    current_of,
    insert_binding,
    lock_thread,
    many,
    note_lost,
    one,
    write_pointer,
)
from sandbox_tools.session.rows import COLUMNS, Binding, Hint, Unless, new_handle
from sandbox_tools.session.uses import Uses


class Bindings(Uses):
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
            lock_thread(db, owner, thread)
            if (found := current_of(db, owner, thread)) is not None:
                return found
            made = insert_binding(db, owner, thread, new_handle(), now, sensitive=sensitive)
            assert made is not None  # nobody has had that handle before
            write_pointer(db, owner, thread, made.handle)
            return made

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
            lock_thread(db, owner, thread)
            bound = insert_binding(
                db,
                owner,
                thread,
                handle,
                now,
                sensitive=sensitive,
                sandbox_id=sandbox_id,
                state=state,
                # The handle may have been bound before: nobody who held it then may have a fence of these.
                fence=secrets.randbits(30),
            )
            if bound is None:
                return False
            before = current_of(db, owner, thread)
            unmade = "DELETE FROM sandboxes WHERE handle = :handle AND state = 'new' AND holder IS NULL"
            if before is None or db.run(unmade, handle=before.handle):
                write_pointer(db, owner, thread, handle)
            return True

        return await self._transact(work)

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
