"""What all tests share: one engine for those that only use it, and the templates of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from sandbox_tools.engine.building.names import leave_user
from sandbox_tools.engine.templates import prepare
from sandbox_tools.paths import state_directory, templates_directory
from tests.machine import EngineProcess
from tests.session.stores import running_postgres

# A machine may be loaded: how long an example takes says nothing about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def templates() -> Iterator[Path]:
    """The warmed templates, made once per machine; every engine of the tests shares them."""
    state = state_directory()
    state.mkdir(parents=True, exist_ok=True)
    directory = templates_directory(state)
    asyncio.run(prepare(state, directory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOX_TOOLS_TEMPLATES_DIR", str(directory))
        if (state / "bin" / "runsc").exists():
            patch.setenv("SANDBOX_TOOLS_RUNSC", str(state / "bin" / "runsc"))
        yield directory


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a file system or bounds memory by cgroup")


@contextlib.contextmanager
def own_state() -> Iterator[Path]:
    """A state directory of the test's own, with a path short enough for a socket's name."""
    directory = Path(tempfile.mkdtemp(prefix="st-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        leave_user(templates_directory(state_directory()), directory)


@contextlib.contextmanager
def running_engine(*options: str) -> Iterator[EngineProcess]:
    """An engine on a state directory of its own, which must leave no process behind."""
    with own_state() as state:
        engine = EngineProcess(state, options=options).start()
        try:
            yield engine
        finally:
            if engine.process is not None and engine.process.poll() is None:
                engine.clear()
                engine.stop()
            assert engine.containers() == []
            # `runsc` forgets a container last: nothing of it is left then, its control groups included.
            assert list(state.glob("runsc/*.state")) == []


@pytest.fixture(scope="session")
def engine(templates: Path) -> Iterator[EngineProcess]:
    """The engine for tests that leave it as they found it."""
    with running_engine() as engine:
        _shared.append(engine)
        yield engine
        _shared.clear()


_shared: list[EngineProcess] = []


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    """The tests of a module leave no sandbox on the shared engine, where those of another would find it."""
    yield
    for engine in _shared:
        left = engine.clear()
        assert left == [], "left on the shared engine by this module's tests, or by a late one of those before it"


@pytest.fixture
def own_engine(templates: Path) -> Iterator[EngineProcess]:
    """An engine for a test that kills it, or looks at all that it holds."""
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A Postgres server of the tests' own; how it is reached."""
    with running_postgres() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches for a cloud because somebody's key is in the environment."""
    for name in list(os.environ):
        if name.startswith(("E2B_", "PPIO_", "NOVITA_", "UCLOUD_", "AGENTBOX_", "SANDBOX_TOOLS_API")):
            monkeypatch.delenv(name)
