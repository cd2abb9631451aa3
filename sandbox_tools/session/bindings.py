"""Remembers which sandbox a conversation has and who uses it now, as plain rows that processes share.

Two facts guard a sandbox. A *use* is shared: a lease (one tool call in flight) or an open turn, each a row with an
expiry that its process renews. A *transition* (create, pause, kill) is exclusive: its holder and fence stand in
the sandbox's own row. A use is refused while a transition is under way and a pause while a use is alive, each in one
transaction, so no two processes can disagree. A write after a transition carries its fence: a holder that slept
past its expiry changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from sandbox_tools.errors import ConfigError

T = TypeVar("T")

Hint = Literal["new", "creating", "running", "frozen", "paused", "unknown"]
"""`creating`: a create was sent and its answer not yet written here. `unknown`: ask the server."""

Unless = Literal["nothing", "leased", "used"]
"""What refuses a transition: nothing, a live lease, or a live lease or open turn."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS sandboxes (
    handle TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    thread TEXT NOT NULL,
    sandbox_id TEXT,
    state TEXT NOT NULL DEFAULT 'new',
    awake_until REAL NOT NULL DEFAULT 0,
    idle_since REAL NOT NULL,
    fence INTEGER NOT NULL DEFAULT 0,
    holder TEXT,
    held_until REAL NOT NULL DEFAULT 0,
    created_at REAL NOT NULL DEFAULT 0,
    due_at REAL,
    sensitive INTEGER NOT NULL DEFAULT 0,
    sentinel TEXT
);
CREATE INDEX IF NOT EXISTS sandboxes_of_an_owner ON sandboxes (owner);
CREATE TABLE IF NOT EXISTS threads (
    owner TEXT NOT NULL,
    thread TEXT NOT NULL,
    handle TEXT,
    lost TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (owner, thread)
);
CREATE TABLE IF NOT EXISTS uses (
    id TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    owner TEXT NOT NULL,
    thread TEXT NOT NULL,
    handle TEXT,
    until REAL NOT NULL,
    pid INTEGER,
    kind TEXT NOT NULL DEFAULT 'use'
);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """One sandbox of one owner, as last written.

    Attributes:
        thread: The thread it was made for; other threads of the owner may have taken it over since.
        sandbox_id: None: none has been made yet, or a create is under way.
        awake_until: When the server's own timer ends it, as we last set it; seconds since the epoch.
        idle_since: When its last lease or turn ended; seconds since the epoch.
        fence: Grows with every transition.
    """

    handle: str
    owner: str
    thread: str
    sandbox_id: str | None
    state: Hint
    awake_until: float
    idle_since: float
    fence: int
    created_at: float = 0
    due_at: float | None = None
    sensitive: bool = False
    sentinel: str | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    id: str
    pid: int | None
    until: float


COLUMNS = ", ".join(field.name for field in fields(Binding))


def new_handle() -> str:
    """A word the model can repeat and nobody can guess: 50 random bits."""
    alphabet = "abcdefghijkmnpqrstuvwxyz23456789"
    return "sbx-" + "".join(secrets.choice(alphabet) for _ in range(10))


class SqliteBindings:
    """Bindings in one SQLite file on a local disk (not NFS); made on first use, readable by this user only.

    Every call runs to its end in one worker thread, in order, even if its caller is cancelled: whoever may be
    cancelled therefore names what it takes (a use's `id`) before it asks.

    Args:
        path: The database file; its directory is made if missing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-bindings")
        self._opened: sqlite3.Connection | None = None

    async def current(self, owner: str, thread: str, now: float, *, sensitive: bool = False) -> Binding:
        """The thread's binding; a new one, with a new handle, if it has none."""

        def work(db: sqlite3.Connection) -> Binding:
            found = _current(db, owner, thread)
            if found is not None:
                return found
            handle = new_handle()
            columns = "(handle, owner, thread, idle_since, created_at, sensitive) VALUES (?, ?, ?, ?, ?, ?)"
            row = db.execute(
                f"INSERT INTO sandboxes {columns} RETURNING {COLUMNS}", (handle, owner, thread, now, now, sensitive)
            ).fetchone()
            _point(db, owner, thread, handle)
            return Binding(**dict(row))

        return await self._transact(work)

    async def find(self, owner: str, thread: str) -> Binding | None:
        """The thread's binding. None: it has none."""
        return await self._transact(lambda db: _current(db, owner, thread))

    async def by_handle(self, owner: str, handle: str) -> Binding | None:
        """The owner's binding of that handle. None: there is none, or it is another owner's."""
        where = "WHERE owner = ? AND handle = ?"
        return await self._transact(lambda db: _one(db, where, (owner, handle)))

    async def of_owner(self, owner: str) -> list[Binding]:
        """All of an owner's bindings."""

        def work(db: sqlite3.Connection) -> list[Binding]:
            rows = db.execute(f"SELECT {COLUMNS} FROM sandboxes WHERE owner = ?", (owner,))
            return [Binding(**dict(row)) for row in rows]

        return await self._transact(work)

    async def point(self, owner: str, thread: str, handle: str | None) -> None:
        """Make a sandbox the thread's current one."""
        await self._transact(lambda db: _point(db, owner, thread, handle))

    async def begin_lease(
        self, owner: str, thread: str, handle: str, *, use: str, holder: str, now: float, until: float
    ) -> Binding | None:
        """Keep the sandbox from being paused until `until`.

        Returns:
            Its binding. None: it is in a transition or gone; look again.
        """

        def work(db: sqlite3.Connection) -> Binding | None:
            found = _one(
                db,
                "WHERE owner = ? AND handle = ? AND (holder IS NULL OR held_until <= ?)",
                (owner, handle, now),
            )
            if found is not None:
                db.execute(
                    "INSERT OR REPLACE INTO uses (id, holder, owner, thread, handle, until) VALUES (?, ?, ?, ?, ?, ?)", (use, holder, owner, thread, handle, until)
                )
            return found

        return await self._transact(work)

    async def begin_turn(self, owner: str, thread: str, *, use: str, holder: str, until: float, now: float = 0) -> None:
        """Keep whatever sandbox the thread has, or gets, from being paused by a policy until `until`."""
        values = (use, holder, owner, thread, None, until)
        await self._transact(lambda db: db.execute("INSERT OR REPLACE INTO uses (id, holder, owner, thread, handle, until) VALUES (?, ?, ?, ?, ?, ?)", values))

    async def end_use(self, use: str, now: float) -> str | None:
        """End a lease or a turn, and let the idle time of its sandbox begin.

        Returns:
            The handle of that sandbox. None: there was no such use, or its thread has no sandbox.
        """

        def work(db: sqlite3.Connection) -> str | None:
            ended = db.execute("DELETE FROM uses WHERE id = ? RETURNING owner, thread, handle", (use,)).fetchone()
            if ended is None:
                return None
            handle: str | None = ended["handle"]
            if handle is None:
                current = _current(db, ended["owner"], ended["thread"])
                handle = current.handle if current else None
            db.execute("UPDATE sandboxes SET idle_since = max(idle_since, ?) WHERE handle = ?", (now, handle))
            return handle

        return await self._transact(work)

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
                AND (kind = 'use' OR :unless = 'used')))
            AND (:unless != 'used' OR NOT EXISTS (
                SELECT 1 FROM uses JOIN threads USING (owner, thread)
                WHERE uses.handle IS NULL AND threads.handle = :handle AND uses.until > :now))
            RETURNING {COLUMNS}"""
        values = {"handle": handle, "holder": holder, "now": now, "until": until, "unless": unless}

        def work(db: sqlite3.Connection) -> Binding | None:
            row = db.execute(statement, values).fetchone()
            return None if row is None else Binding(**dict(row))

        return await self._transact(work)

    async def write(self, held: Binding, *, state: Hint, sandbox_id: str | None, awake_until: float = 0) -> bool:
        """Note what the server was asked or has answered, the transition going on. False: the fence has passed."""
        return await self._write(held, "", (sandbox_id, state, awake_until))

    async def end_transition(
        self, held: Binding, *, state: Hint, sandbox_id: str | None, awake_until: float = 0, due_at: float | None = None
    ) -> bool:
        """Note the outcome and let others in. False: the fence has passed, nothing was written."""
        due = "NULL" if due_at is None else repr(due_at)
        return await self._write(held, f", holder = NULL, held_until = 0, due_at = {due}", (sandbox_id, state, awake_until))

    async def _write(self, held: Binding, more: str, values: tuple[str | None, str, float]) -> bool:
        statement = (
            f"UPDATE sandboxes SET sandbox_id = ?, state = ?, awake_until = ?{more} WHERE handle = ? AND fence = ?"
        )
        return await self._transact(
            lambda db: db.execute(statement, (*values, held.handle, held.fence)).rowcount == 1,
        )

    async def abandon(self, held: Binding) -> None:
        """End the transition if it has not been ended; what was running then may be running still."""
        statement = """
            UPDATE sandboxes SET holder = NULL, held_until = 0, state = iif(state = 'running', 'unknown', state)
            WHERE handle = ? AND fence = ? AND holder IS NOT NULL"""
        await self._transact(lambda db: db.execute(statement, (held.handle, held.fence)))

    async def note(self, held: Binding, *, state: Hint, awake_until: float) -> None:
        """Note what was seen of the sandbox under a lease, where no transition is needed to see it."""
        await self._transact(
            lambda db: db.execute(
                "UPDATE sandboxes SET state = ?, awake_until = ?, due_at = NULL WHERE handle = ? AND sandbox_id = ?",
                (state, awake_until, held.handle, held.sandbox_id),
            )
        )

    async def forget(self, held: Binding, *, lost: bool) -> bool:
        """Drop the binding in a transition; its threads have no sandbox then.

        Args:
            lost: Whether its threads are to be told, once, that their state was lost.

        Returns:
            False: the fence has passed, nothing was dropped.
        """

        def work(db: sqlite3.Connection) -> bool:
            dropped = db.execute("DELETE FROM sandboxes WHERE handle = ? AND fence = ?", (held.handle, held.fence))
            if dropped.rowcount:
                db.execute(
                    "UPDATE threads SET handle = NULL, lost = iif(?, 'sandbox', lost) WHERE handle = ?", (lost, held.handle)
                )
            return dropped.rowcount == 1

        return await self._transact(work)

    async def take_lost(self, owner: str, thread: str) -> frozenset[str]:
        def work(db):
            row = db.execute("SELECT lost FROM threads WHERE owner = ? AND thread = ?", (owner, thread)).fetchone()
            db.execute("UPDATE threads SET lost = '' WHERE owner = ? AND thread = ?", (owner, thread))
            return frozenset(row["lost"].split()) if row else frozenset()
        return await self._transact(work)

    async def note_lost(self, handle, *parts):
        await self._transact(lambda db: db.execute("UPDATE threads SET lost = lost || ' ' || ? WHERE handle = ?", (" ".join(parts), handle)))

    async def mark(self, held, text):
        await self._transact(lambda db: db.execute("UPDATE sandboxes SET sentinel = ? WHERE handle = ? AND sandbox_id = ?", (text, held.handle, held.sandbox_id)))

    async def get(self, handle):
        return await self._transact(lambda db: _one(db, "WHERE handle = ?", (handle,)))

    async def adopt(self, owner, thread, handle, *, sandbox_id, state, sensitive, now):
        def work(db):
            if db.execute("SELECT 1 FROM sandboxes WHERE handle = ? OR sandbox_id = ?", (handle, sandbox_id)).fetchone():
                return False
            db.execute("INSERT INTO sandboxes (handle, owner, thread, sandbox_id, state, idle_since, created_at, sensitive) VALUES (?,?,?,?,?,?,?,?)", (handle, owner, thread, sandbox_id, state, now, now, sensitive))
            if _current(db, owner, thread) is None:
                _point(db, owner, thread, handle)
            return True
        return await self._transact(work)

    async def hold(self, owner, thread, handle, *, use, pid, until):
        await self._transact(lambda db: db.execute("INSERT OR REPLACE INTO uses VALUES (?, 'hold', ?, ?, ?, ?, ?, 'hold')", (use, owner, thread, handle, until, pid)))

    async def holds(self, handle, now):
        return await self._transact(lambda db: [Hold(r["id"], r["pid"], r["until"]) for r in db.execute("SELECT * FROM uses WHERE handle = ? AND kind = 'hold' AND until > ?", (handle, now))])

    async def list_idle(self, before, now):
        return await self._transact(lambda db: [r["handle"] for r in db.execute("""SELECT handle FROM sandboxes WHERE sandbox_id IS NOT NULL AND state != 'paused' AND coalesce(due_at, 0) <= ?
            AND (holder IS NULL OR held_until <= ?) AND NOT EXISTS (SELECT 1 FROM uses WHERE uses.handle = sandboxes.handle AND kind = 'use' AND uses.until > ?)
            AND NOT EXISTS (SELECT 1 FROM uses JOIN threads USING (owner, thread) WHERE uses.handle IS NULL AND threads.handle = sandboxes.handle AND uses.until > ?)""", (before, now, now, now))])

    async def tallies(self, owner, key):
        return None, None

    async def begin_idle(self, handle, **more): ...

    async def renew(self, holder: str, *, now: float, until: float) -> None:
        """Prolong all uses and transitions of one registry, and drop what dead ones left a day ago."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE uses SET until = ? WHERE holder = ?", (until, holder))
            db.execute("UPDATE sandboxes SET held_until = ? WHERE holder = ?", (until, holder))
            db.execute("DELETE FROM uses WHERE until < ?", (now - 86_400,))

        await self._transact(work)

    async def aclose(self) -> None:
        """Close the file; calls already made are finished first."""

        def close() -> None:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

        await asyncio.get_running_loop().run_in_executor(self._worker, close)
        self._worker.shutdown(wait=False)

    async def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def transaction() -> T:
            db = self._open()
            # The write lock is taken at once: a reader that turns writer could fail halfway.
            db.execute("BEGIN IMMEDIATE")
            try:
                outcome = work(db)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
            return outcome

        return await asyncio.get_running_loop().run_in_executor(self._worker, transaction)

    def _open(self) -> sqlite3.Connection:
        if self._opened is None:
            if self.path != ":memory:":
                _make_private(Path(self.path))
            db = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
            db.row_factory = sqlite3.Row
            _use_wal(db)
            db.executescript(SCHEMA)
            self._opened = db
        return self._opened


class MemoryBindings(SqliteBindings):
    """Bindings that end with the process, and that no other process sees."""

    def __init__(self) -> None:
        super().__init__(":memory:")


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        msg = f"Cannot write the bindings to {str(path)!r}: {error.strerror}. Set `SANDBOX_TOOLS_STATE_DIR`."
        raise ConfigError(msg) from error


def _use_wal(db: sqlite3.Connection) -> None:
    # The only statement that SQLite's own timeout does not cover: two that open a new file at once collide here.
    give_up = time.monotonic() + 30
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _one(db: sqlite3.Connection, where: str, values: tuple[object, ...]) -> Binding | None:
    row = db.execute(f"SELECT {COLUMNS} FROM sandboxes {where}", values).fetchone()
    return None if row is None else Binding(**dict(row))


def _current(db: sqlite3.Connection, owner: str, thread: str) -> Binding | None:
    where = "WHERE handle = (SELECT handle FROM threads WHERE owner = ? AND thread = ?)"
    return _one(db, where, (owner, thread))


def _point(db: sqlite3.Connection, owner: str, thread: str, handle: str | None) -> None:
    db.execute(
        "INSERT INTO threads (owner, thread, handle) VALUES (?, ?, ?) "
        "ON CONFLICT (owner, thread) DO UPDATE SET handle = excluded.handle",
        (owner, thread, handle),
    )

Bindings = SqliteBindings
State = str
