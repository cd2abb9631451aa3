"""The tables of bindings, and how those of earlier versions become them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandbox_tools.errors import ConfigError

if TYPE_CHECKING:
    from sandbox_tools.session.database import Connection

# Each step is done once, in order, in one transaction. Steps are only added: a file may be of any of them.
STEPS: tuple[tuple[str, ...], ...] = (
    (
        # As of the first version, which did not write down its number.
        """
        CREATE TABLE IF NOT EXISTS sandboxes (
            handle TEXT PRIMARY KEY,
            owner TEXT NOT NULL,
            thread TEXT NOT NULL,
            sandbox_id TEXT,
            state TEXT NOT NULL DEFAULT 'new',
            awake_until DOUBLE PRECISION NOT NULL DEFAULT 0,
            idle_since DOUBLE PRECISION NOT NULL,
            fence INTEGER NOT NULL DEFAULT 0,
            holder TEXT,
            held_until DOUBLE PRECISION NOT NULL DEFAULT 0
        )""",
        "CREATE INDEX IF NOT EXISTS sandboxes_of_an_owner ON sandboxes (owner)",
        """
        CREATE TABLE IF NOT EXISTS threads (
            owner TEXT NOT NULL,
            thread TEXT NOT NULL,
            handle TEXT,
            lost INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (owner, thread)
        )""",
        """
        CREATE TABLE IF NOT EXISTS uses (
            id TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            owner TEXT NOT NULL,
            thread TEXT NOT NULL,
            handle TEXT,
            until DOUBLE PRECISION NOT NULL
        )""",
    ),
    (
        "ALTER TABLE sandboxes ADD COLUMN created_at DOUBLE PRECISION NOT NULL DEFAULT 0",
        "UPDATE sandboxes SET created_at = idle_since",
        "ALTER TABLE sandboxes ADD COLUMN due_at DOUBLE PRECISION",
        "ALTER TABLE sandboxes ADD COLUMN sensitive INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE sandboxes ADD COLUMN sentinel TEXT",
        "CREATE UNIQUE INDEX one_binding_a_sandbox ON sandboxes (sandbox_id)",
        "ALTER TABLE threads ADD COLUMN losses TEXT NOT NULL DEFAULT ''",
        "UPDATE threads SET losses = 'sandbox' WHERE lost = 1",
        "CREATE INDEX threads_of_a_sandbox ON threads (handle)",
        # `turn`, `lease`, or `hold`, which no process renews; a hold may be a command's.
        "ALTER TABLE uses ADD COLUMN kind TEXT NOT NULL DEFAULT 'lease'",
        "UPDATE uses SET kind = 'turn' WHERE handle IS NULL",
        "ALTER TABLE uses ADD COLUMN pid INTEGER",
        "CREATE INDEX uses_of_a_sandbox ON uses (handle)",
        "CREATE INDEX uses_of_a_thread ON uses (owner, thread)",
        "CREATE INDEX uses_of_a_holder ON uses (holder)",
        """
        CREATE TABLE idles (
            handle TEXT NOT NULL,
            began DOUBLE PRECISION NOT NULL,
            owner TEXT NOT NULL,
            terms TEXT NOT NULL,
            threshold DOUBLE PRECISION,
            ended DOUBLE PRECISION,
            lead DOUBLE PRECISION,
            priced INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (handle, began)
        )""",
        "CREATE INDEX idles_by_terms ON idles (terms, began)",
        # The pool's has an empty owner, which nobody can be.
        """
        CREATE TABLE tallies (
            terms TEXT NOT NULL,
            owner TEXT NOT NULL,
            tally BYTEA NOT NULL,
            PRIMARY KEY (terms, owner)
        )""",
        """
        CREATE TABLE accounts (
            handle TEXT PRIMARY KEY,
            owner TEXT NOT NULL,
            thread TEXT NOT NULL,
            account TEXT NOT NULL
        )""",
        "CREATE INDEX accounts_of_an_owner ON accounts (owner)",
    ),
)


def migrate(db: Connection, where: str) -> None:
    """Bring the tables up to this version, within the caller's transaction.

    Args:
        where: Which database, for errors.

    Raises:
        ConfigError: They are of a later version.
    """
    db.run("CREATE TABLE IF NOT EXISTS bindings_schema (version INTEGER NOT NULL)")
    found = db.rows("SELECT version FROM bindings_schema")
    version = found[0]["version"] if found else 0
    if version > len(STEPS):
        msg = f"The bindings in {where} were written by a later version of sandbox-tools. Upgrade this one."
        raise ConfigError(msg)
    for step in STEPS[version:]:
        for statement in step:
            db.run(statement)
    if not found:
        db.run("INSERT INTO bindings_schema (version) VALUES (:version)", version=len(STEPS))
    elif version < len(STEPS):
        db.run("UPDATE bindings_schema SET version = :version", version=len(STEPS))
