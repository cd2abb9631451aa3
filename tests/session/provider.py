"""A provider in memory, with the failures a real one cannot be asked for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sandbox_tools.errors import NotFoundError, SandboxError
from sandbox_tools.models import SandboxInfo
from sandbox_tools.testing import ManualClock


@dataclass
class Machine:
    id: str
    metadata: dict[str, str]
    state: str
    started_at: float
    end: float
    memory: list[str] = field(default_factory=list)


class Provider:
    """The server: what all clients see."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.machines: dict[str, Machine] = {}
        self.log: list[tuple[str, str]] = []
        self.counter = itertools.count(1)
        self.gates: dict[str, asyncio.Event] = {}
        """A verb with a gate waits there, after having taken effect, before it answers."""
        self.reached: dict[str, asyncio.Event] = {}
        self.failures: dict[str, list[tuple[bool, SandboxError]]] = {}
        """Errors to answer a verb with, in order, and whether the verb takes effect all the same."""

    def fail(self, verb: str, error: SandboxError, *, after: bool = False) -> None:
        self.failures.setdefault(verb, []).append((after, error))

    def gate(self, verb: str) -> tuple[asyncio.Event, asyncio.Event]:
        self.gates[verb], self.reached[verb] = asyncio.Event(), asyncio.Event()
        return self.reached[verb], self.gates[verb]

    def tick(self) -> None:
        for machine in self.machines.values():
            if machine.state == "running" and machine.end <= self.clock.time():
                machine.state = "paused"
                self.log.append(("timeout", machine.id))

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.log]


class Handle:
    """What a session yields here in place of a `Sandbox`."""

    def __init__(self, provider: Provider, id: str) -> None:
        self.provider = provider
        self.id = id

    def remember(self, word: str) -> list[str]:
        self.provider.tick()
        machine = self.provider.machines[self.id]
        assert machine.state == "running", "code was sent to a sandbox that sleeps"
        machine.memory.append(word)
        return machine.memory


class ProviderClient:
    """Shaped like `Client`."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    async def _enter(self, verb: str, id: str) -> SandboxError | None:
        await asyncio.sleep(0)
        self.provider.tick()
        after, error = (self.provider.failures.get(verb) or [(False, None)]).pop(0)
        if error is not None and not after:
            raise error
        self.provider.log.append((verb, id))
        return error

    async def _leave(self, verb: str, error: SandboxError | None) -> None:
        if verb in self.provider.gates:
            self.provider.reached[verb].set()
            await self.provider.gates[verb].wait()
        else:
            await asyncio.sleep(0)
        if error is not None:
            raise error

    def _machine(self, id: str) -> Machine:
        if id not in self.provider.machines:
            raise NotFoundError(f"Sandbox {id} doesn't exist")
        return self.provider.machines[id]

    async def create(self, template=None, *, timeout=300, auto_pause=True, metadata=None, env=None) -> Handle:
        assert auto_pause
        id = f"m{next(self.provider.counter)}"
        error = await self._enter("create", id)
        now = self.provider.clock.time()
        self.provider.machines[id] = Machine(id, dict(metadata or {}), "running", now, now + timeout)
        await self._leave("create", error)
        return Handle(self.provider, id)

    async def connect(self, sandbox_id: str, *, timeout: int = 300) -> Handle:
        error = await self._enter("connect", sandbox_id)
        machine, now = self._machine(sandbox_id), self.provider.clock.time()
        machine.end = max(machine.end if machine.state == "running" else 0, now + timeout)
        machine.state = "running"
        await self._leave("connect", error)
        return Handle(self.provider, sandbox_id)

    async def pause(self, sandbox_id: str) -> bool:
        error = await self._enter("pause", sandbox_id)
        machine = self._machine(sandbox_id)
        was, machine.state, machine.end = machine.state, "paused", self.provider.clock.time()
        await self._leave("pause", error)
        return was == "running"

    async def kill(self, sandbox_id: str) -> bool:
        error = await self._enter("kill", sandbox_id)
        killed = self.provider.machines.pop(sandbox_id, None) is not None
        await self._leave("kill", error)
        return killed

    async def info(self, sandbox_id: str) -> SandboxInfo:
        error = await self._enter("info", sandbox_id)
        machine = self._machine(sandbox_id)
        await self._leave("info", error)
        return self._render(machine)

    async def list(self, *, state=None, metadata=None) -> AsyncIterator[SandboxInfo]:
        error = await self._enter("list", "")
        await self._leave("list", error)
        for machine in list(self.provider.machines.values()):
            if state in (None, machine.state) and (metadata or {}).items() <= machine.metadata.items():
                yield self._render(machine)

    async def set_timeout(self, sandbox_id: str, timeout: int) -> None:
        error = await self._enter("set_timeout", sandbox_id)
        machine = self._machine(sandbox_id)
        if machine.state != "running":
            raise NotFoundError(f"Sandbox {sandbox_id} doesn't exist")
        machine.end = self.provider.clock.time() + timeout
        await self._leave("set_timeout", error)

    async def aclose(self) -> None: ...

    def _render(self, machine: Machine) -> SandboxInfo:
        return SandboxInfo(
            sandbox_id=machine.id,
            template_id="t",
            state=machine.state,
            started_at=datetime.fromtimestamp(machine.started_at, UTC),
            end_at=datetime.fromtimestamp(machine.end, UTC),
            metadata=machine.metadata,
        )
