"""A real engine in the test's own process: for what its flags don't set, the clock above all."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from sandbox_tools.engine.front import Front
from sandbox_tools.engine.images import keys
from sandbox_tools.engine.images.memory import Memory
from sandbox_tools.engine.images.store import Store
from sandbox_tools.engine.operations import Engine
from sandbox_tools.engine.runsc import Runsc
from sandbox_tools.engine.serve import _listen, _Server
from sandbox_tools.engine.supervisor import Supervisor
from sandbox_tools.engine.templates import prepare
from tests.conftest import own_state
from tests.machine import PATIENCE, EngineProcess

T = TypeVar("T")


class EngineInside(EngineProcess):
    """An engine in a thread, with a clock that can be put forward."""

    def __init__(self, state: Path, templates: Path, *, max_sandboxes: int | None, host: str | None) -> None:
        super().__init__(state)
        self.ahead = timedelta()
        self.port = 0
        self.supervisor: Supervisor
        self._templates = templates
        self._most = max_sandboxes
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def now(self) -> datetime:
        """Its clock."""
        return datetime.now(UTC) + self.ahead

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in its loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    @contextlib.contextmanager
    def serving(self, api_key: str | None = None) -> Iterator[EngineInside]:
        """Serve on its socket, or on a TCP port where a host was given."""
        self.state.mkdir(exist_ok=True)
        engine = Engine()
        listener = _listen(self.state, None, self._host, 0)
        if self._host is not None:
            self.port = listener.getsockname()[1]
        config = uvicorn.Config(Front(engine, api_key=api_key), log_config=None, access_log=False, lifespan="off")
        server = _Server(config)
        self._thread.start()
        try:
            self.do(self._begin(engine))
            serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), self._loop)
            yield self
            server.should_exit = True
            serving.result(PATIENCE)
            self.do(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            assert self.containers() == []

    async def _begin(self, engine: Engine) -> None:
        template = await prepare(self.state, self._templates)
        runtime = Runsc(template.runsc, self.state / "runsc")
        self.supervisor = Supervisor(
            self.state,
            self._templates,
            template,
            runtime,
            store=Store(keys.load(self.state), Memory.of(self.state)),
            now=self.now,
            max_sandboxes=self._most,
        )
        await self.supervisor.start()
        engine.supervisor = self.supervisor

    async def _end(self) -> None:
        for entry in self.supervisor.entries():
            await self.supervisor.kill(entry.record.id)
        await self.supervisor.stop()


@contextlib.contextmanager
def engine_inside(
    templates: Path, *, max_sandboxes: int | None = None, host: str | None = None, api_key: str | None = None
) -> Iterator[EngineInside]:
    """An engine of the test's own, on a state directory of its own."""
    with (
        own_state() as state,
        EngineInside(state, templates, max_sandboxes=max_sandboxes, host=host).serving(api_key) as engine,
    ):
        yield engine
