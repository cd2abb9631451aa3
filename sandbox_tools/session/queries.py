"""The statements that the calls of bindings are made of; each is a part of a transaction."""

from __future__ import annotations

from sandbox_tools.session.database import Connection, Row
from sandbox_tools.session.rows import COLUMNS, Binding, Hint


def binding_in(row: Row) -> Binding:
    return Binding(**{**row, "sensitive": bool(row["sensitive"])})


def many(db: Connection, where: str, **values: object) -> list[Binding]:
    return [binding_in(row) for row in db.rows(f"SELECT {COLUMNS} FROM sandboxes {where}", **values)]


def one(db: Connection, where: str, **values: object) -> Binding | None:
    return next(iter(many(db, where, **values)), None)


def current_of(db: Connection, owner: str, thread: str) -> Binding | None:
    where = "WHERE handle = (SELECT handle FROM threads WHERE owner = :owner AND thread = :thread)"
    return one(db, where, owner=owner, thread=thread)


def lock_thread(db: Connection, owner: str, thread: str) -> None:
    """Have others that would give the thread a sandbox wait until this transaction ends."""
    where = {"owner": owner, "thread": thread}
    db.run(
        "INSERT INTO threads (owner, thread) VALUES (:owner, :thread) ON CONFLICT (owner, thread) DO NOTHING", **where
    )
    db.rows(f"SELECT 1 FROM threads WHERE owner = :owner AND thread = :thread{db.lock}", **where)


def insert_binding(
    db: Connection,
    owner: str,
    thread: str,
    handle: str,
    now: float,
    *,
    sensitive: bool,
    sandbox_id: str | None = None,
    state: Hint = "new",
    fence: int = 0,
) -> Binding | None:
    """A new row. None: the handle or the sandbox has one."""
    rows = db.rows(
        f"""
        INSERT INTO sandboxes (handle, owner, thread, idle_since, created_at, sensitive, sandbox_id, state, fence)
        VALUES (:handle, :owner, :thread, :now, :now, :sensitive, :sandbox_id, :state, :fence)
        ON CONFLICT DO NOTHING RETURNING {COLUMNS}""",
        handle=handle,
        owner=owner,
        thread=thread,
        now=now,
        sensitive=int(sensitive),
        sandbox_id=sandbox_id,
        state=state,
        fence=fence,
    )
    return binding_in(rows[0]) if rows else None


def write_pointer(db: Connection, owner: str, thread: str, handle: str | None) -> None:
    db.run(
        "INSERT INTO threads (owner, thread, handle) VALUES (:owner, :thread, :handle) "
        "ON CONFLICT (owner, thread) DO UPDATE SET handle = excluded.handle",
        owner=owner,
        thread=thread,
        handle=handle,
    )


def write_use(
    db: Connection,
    use: str,
    kind: str,
    holder: str,
    owner: str,
    thread: str,
    handle: str | None,
    until: float,
    pid: int | None = None,
) -> None:
    db.run(
        """
        INSERT INTO uses (id, kind, holder, owner, thread, handle, until, pid)
        VALUES (:id, :kind, :holder, :owner, :thread, :handle, :until, :pid)
        ON CONFLICT (id) DO UPDATE SET until = excluded.until, handle = excluded.handle""",
        id=use,
        kind=kind,
        holder=holder,
        owner=owner,
        thread=thread,
        handle=handle,
        until=until,
        pid=pid,
    )


def note_used(db: Connection, handle: str, now: float, *, leased: bool) -> None:
    """The idle period is over, and nothing is due; the first lease after it says how long the model thought."""
    db.run("UPDATE sandboxes SET due_at = NULL WHERE handle = :handle AND due_at IS NOT NULL", handle=handle)
    db.run("UPDATE idles SET ended = :now WHERE handle = :handle AND ended IS NULL", now=now, handle=handle)
    if leased:
        db.run("UPDATE idles SET lead = :now - ended WHERE handle = :handle AND lead IS NULL", now=now, handle=handle)


def note_lost(db: Connection, handle: str, lost: set[str]) -> None:
    for row in db.rows(f"SELECT owner, thread, losses FROM threads WHERE handle = :handle{db.lock}", handle=handle):
        losses = ",".join(sorted(lost | set(filter(None, row["losses"].split(",")))))
        where = "WHERE owner = :owner AND thread = :thread"
        db.run(f"UPDATE threads SET losses = :losses {where}", losses=losses, owner=row["owner"], thread=row["thread"])
