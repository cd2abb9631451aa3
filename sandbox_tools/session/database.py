"""Two databases behind one statement: SQL that both understand, run whole in a worker thread."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

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
        self._latest: WeakValueDictionary[str, Future[Any]] = WeakValueDictionary()

    async def transact(self, work: Callable[[Connection], T], *, key: str | None = None) -> T:
        """What `work` gives; all of it happens, or, if it raises, nothing. It may be run again: it must be pure else.

        Args:
            key: Those with the same one are run in the order of these calls, whichever worker has them.

        Raises:
            ConfigError: The database can't be used at all.
            TransportError: It could not be reached; whether this happened is not known where `retryable` is None.
        """
        outcome: Future[T] = Future()
        outcome.set_running_or_notify_cancel()  # From here on a cancelled caller cancels only its waiting.
        before = self._latest.get(key) if key else None
        if key:
            self._latest[key] = outcome

        def run() -> None:
            if before is not None:
                wait([before])  # It came first, so a worker has it or had it: this ends.
            try:
                outcome.set_result(self._transact(work))
            except BaseException as error:
                outcome.set_exception(error)

        self._workers.submit(run)
        return await asyncio.wrap_future(outcome)

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
        try:
            if self._opened is None:
                self._opened = self._open()
            with _begun(self._opened.db):
                return work(self._opened)
        except sqlite3.OperationalError as error:
            msg = f"The bindings in {str(self.path)!r} could not be used: {error}. See to the disk, and try again."
            raise TransportError(msg, op="bindings", retryable=True) from error

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
        if db.in_transaction:  # A full disk has SQLite undo it by itself.
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
