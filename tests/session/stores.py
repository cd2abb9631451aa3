"""The stores that bindings may be in: memory, a file, and a real Postgres that the tests start."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_tools.session.bindings import Bindings, MemoryBindings, PostgresBindings, SqliteBindings

STORES = ("memory", "file", "postgres")


def postgres_programs() -> Path | None:
    """Where Debian's package has them. None: it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """A server on a Unix socket in a directory of its own, for the tests only; how it is reached."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("Postgres is not installed: `make postgres` does it, as root on Debian")
    place = Path(tempfile.mkdtemp(prefix="pg-"))
    # The server refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() == 0:
        shutil.chown(place, user)
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    else:
        as_user = []
    try:
        data, log = place / "data", place / "log"
        subprocess.run(
            [*as_user, programs / "initdb", "-D", data, "-A", "trust", "--no-sync", "-U", "tests"],
            check=True,
            capture_output=True,
            cwd=place,
        )
        settings = f"-c listen_addresses= -c unix_socket_directories={place} -c fsync=off"
        start = [*as_user, programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "start"]
        subprocess.run(start, check=True, capture_output=True, cwd=place)
        try:
            yield f"host={place} user=tests"
        finally:
            stop = [*as_user, programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"]
            subprocess.run(stop, check=True, capture_output=True, cwd=place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def empty_database(server: str) -> str:
    """A new database on that server."""
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(f"{server} dbname=postgres", autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
    return f"{server} dbname={name}"


def place_of(store: str, request: pytest.FixtureRequest, directory: Path) -> str:
    """An empty store's place, as `bindings_at` takes it."""
    if store == "postgres":
        return empty_database(request.getfixturevalue("postgres"))
    return ":memory:" if store == "memory" else str(directory / "sessions.db")


def bindings_at(place: str) -> Bindings:
    """Bindings in that store; several of a file or a database share it."""
    if place.startswith("host="):
        return PostgresBindings(place)
    return MemoryBindings() if place == ":memory:" else SqliteBindings(place)
