"""Two databases behind one statement: SQL that both understand, run whole in a worker thread."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sandbox_tools.errors import ConfigError, TransportError
from sandbox_tools.session.schema import migrate

T = TypeVar("T")

Row = Mapping[str, Any]


class Connection(Protocol):
    """One transaction's view of a database."""

    def rows(self, statement: str, **values: object) -> list[Row]:
        """What a statement with `:name` parameters gives, row by row."""
        ...

    def run(self, statement: str, **values: object) -> int:
        """Run a statement that gives no rows; how many it has changed."""
        ...

    lock: str
    """Ends a SELECT whose rows are to stay as they are until the transaction ends."""


class Database:
    """Runs transactions in worker threads, each to its end even if its caller is cancelled.

    Args:
        workers: How many at the same time.
        name: Of the threads.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._workers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix=name)

    async def transact(self, work: Callable[[Connection], T]) -> T:
        """What `work` gives; all of it happens, or, if it raises, nothing. It may be run again: it must be pure else.

        Raises:
            ConfigError: The database can't be used at all.
            TransportError: It could not be reached; whether this happened is not known where `retryable` is None.
        """
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._transact, work)

    async def aclose(self) -> None:
        """Close it; transactions already begun are finished first."""
        await asyncio.get_running_loop().run_in_executor(None, self._workers.shutdown)
        self._close()

    def _transact(self, work: Callable[[Connection], T]) -> T:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class SqliteDatabase(Database):
    """One file on a local disk (not NFS); made on first use, readable by this user only.

    Args:
        path: Its directory is made if missing. `":memory:"`: it ends with this object.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(1, "sandbox-bindings")
        self.path = path
        self._opened: _Sqlite | None = None

    def _transact(self, work: Callable[[Connection], T]) -> T:
        if self._opened is None:
            self._opened = self._open()
        with _begun(self._opened.db):
            return work(self._opened)

    def _open(self) -> _Sqlite:
        if self.path != ":memory:":
            _make_private(Path(self.path))
        db = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
        db.row_factory = sqlite3.Row
        _use_wal(db)
        opened = _Sqlite(db)
        with _begun(db):
            migrate(opened, f"the file {str(self.path)!r}")
        return opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.db.close()
            self._opened = None


class _Sqlite:
    lock = ""  # A transaction that is to write has locked all there is.

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def rows(self, statement: str, **values: object) -> list[Row]:
        return [dict(row) for row in self.db.execute(statement, values)]

    def run(self, statement: str, **values: object) -> int:
        return self.db.execute(statement, values).rowcount


@contextmanager
def _begun(db: sqlite3.Connection) -> Iterator[None]:
    # The write lock is taken at once: a reader that turns writer could fail halfway.
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


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
