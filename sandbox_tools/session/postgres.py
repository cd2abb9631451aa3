"""Postgres behind the statements of the bindings: a connection a worker, and what is done when one breaks."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from sandbox_tools.errors import ConfigError, TransportError
from sandbox_tools.session.database import Connection, Database, Row
from sandbox_tools.session.schema import migrate

T = TypeVar("T")

ATTEMPTS = 5
"""How often a transaction is tried that collided with another, or whose connection was found broken."""


class PostgresDatabase(Database):
    """A database that many hosts share, whose clocks agree within some seconds; needs the extra `postgres`.

    Args:
        place: As libpq takes it: `postgresql://user@host/name` or `host=... dbname=...`.
        connections: How many this process opens at most.
    """

    def __init__(self, place: str, *, connections: int = 4) -> None:
        super().__init__(connections, "sandbox-bindings")
        try:
            import psycopg
        except ImportError as error:
            msg = "Postgres needs the extra `postgres`: pip install 'sandbox-tools[postgres]'."
            raise ConfigError(msg) from error
        self._psycopg = psycopg
        self._place = place
        self._own = threading.local()
        self._all: list[Any] = []
        self._noting = threading.Lock()
        self._migrated = False

    def _transact(self, work: Callable[[Connection], T]) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            committing = False
            try:
                db = self._connected()
                with db.transaction():
                    outcome = work(_Postgres(db, self._psycopg.rows.dict_row))
                    committing = True
                return outcome
            except (self._psycopg.errors.SerializationFailure, self._psycopg.errors.DeadlockDetected) as error:
                # The server has undone all of it.
                if attempt == ATTEMPTS:
                    raise self._failed(error, retryable=True) from error
            except self._psycopg.OperationalError as error:
                self._drop()
                if committing:
                    raise self._failed(error, retryable=None) from error
                if attempt == ATTEMPTS:
                    raise self._failed(error, retryable=True) from error
            time.sleep(0.01 * 2**attempt)
        raise AssertionError

    def _connected(self) -> Any:
        db = getattr(self._own, "db", None)
        if db is None:
            db = self._psycopg.connect(self._place, autocommit=True, connect_timeout=10)
            self._own.db = db
            with self._noting:
                self._all.append(db)
                if not self._migrated:
                    with db.transaction():
                        db.execute("SELECT pg_advisory_xact_lock(7266371003)")  # Two that upgrade at once wait here.
                        migrate(_Postgres(db, self._psycopg.rows.dict_row), "the Postgres database")
                    self._migrated = True
        return db

    def _drop(self) -> None:
        db, self._own.db = getattr(self._own, "db", None), None
        if db is not None:
            with self._noting:
                self._all.remove(db)
            with suppress(self._psycopg.Error):
                db.close()

    def _failed(self, error: Exception, *, retryable: bool | None) -> TransportError:
        first = (str(error).splitlines() or [""])[0]
        msg = f"The bindings' Postgres database could not be used: {first}. Check that it runs, and try again."
        return TransportError(msg, op="bindings", retryable=retryable)

    def _close(self) -> None:
        for db in self._all:
            db.close()
        self._all.clear()


class _Postgres:
    lock = " FOR UPDATE"

    def __init__(self, db: Any, as_dict: Any) -> None:
        self._db = db
        self._as_dict = as_dict

    def rows(self, statement: str, **values: object) -> list[Row]:
        with self._db.cursor(row_factory=self._as_dict) as cursor:
            return list(cursor.execute(_spelt(statement), values))

    def run(self, statement: str, **values: object) -> int:
        return int(self._db.execute(_spelt(statement), values).rowcount)


def _spelt(statement: str) -> str:
    """With psycopg's parameters; no statement here has a colon or a percent sign for anything else."""
    return re.sub(r":([a-z_]+)", r"%(\1)s", statement)
