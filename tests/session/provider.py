"""A provider in memory, with the failures a real one cannot be asked for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace

from sandbox_tools.client.dialects import LOCAL, Dialect
from sandbox_tools.client.sentinel import Sentinel
from sandbox_tools.errors import ConflictError, NotFoundError, SandboxError, SandboxStateError, StateLostError
from sandbox_tools.models import Execution, SandboxInfo, Stdout
from sandbox_tools.testing import ManualClock


@dataclass
class Machine:
    id: str
    metadata: dict[str, str]
    state: str
    started_at: float
    end: float
    memory: list[str] = field(default_factory=list)
    kept: str = "memory"
    """What a pause at the timeout keeps, or `"nothing"`: it ends then."""
    frozen: bool = False
    busy: bool = False
    """Whether a stream to it is open."""
    commands: set[int] = field(default_factory=set)
    marks: dict[str, int] = field(default_factory=dict)

    def pause(self, now: float, keeps: str) -> None:
        self.state, self.end, self.frozen = "paused", now, False
        if keeps == "files":
            self.memory.clear()
            self.commands.clear()
            self.marks.pop("memory", None)


class Provider:
    """The server: what all clients see."""

    def __init__(self, clock: ManualClock, dialect: Dialect = LOCAL) -> None:
        self.clock = clock
        self.dialect = dialect
        self.machines: dict[str, Machine] = {}
        self.log: list[tuple[str, str]] = []
        self.counter = itertools.count(1)
        self.interpreter = echo
        """What code does here."""
        self.keeps_for = 0.0
        """Seconds for which it says that it keeps what is paused. 0: it does not say."""
        self.unreachable: SandboxError | None = None
        """What every request to a sandbox's own address fails with."""
        self.gates: dict[str, asyncio.Event] = {}
        """A verb with a gate waits there, after having taken effect, before it answers."""
        self.reached: dict[str, asyncio.Event] = {}
        self.failures: dict[str, list[tuple[bool, SandboxError]]] = {}
        """Errors to answer a verb with, in order, and whether the verb takes effect all the same."""

    def fail(self, verb: str, error: SandboxError, *, after: bool = False) -> None:
        self.failures.setdefault(verb, []).append((after, error))

    def failing(self) -> bool:
        return any(self.failures.values())

    def gate(self, verb: str) -> tuple[asyncio.Event, asyncio.Event]:
        self.gates[verb], self.reached[verb] = asyncio.Event(), asyncio.Event()
        return self.reached[verb], self.gates[verb]

    def tick(self) -> None:
        for machine in list(self.machines.values()):
            if machine.state == "running" and machine.end <= self.clock.time():
                self.log.append(("timeout", machine.id))
                machine.pause(machine.end, machine.kept)
                if machine.kept == "nothing":
                    del self.machines[machine.id]

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.log]


class Handle:
    """What a session yields here in place of a `Sandbox`."""

    def __init__(self, provider: Provider, id: str) -> None:
        self.provider = provider
        self.id = id
        self.commands = Commands(self)
        self.count = 0

    def remember(self, word: str) -> list[str]:
        machine = self.reach()
        machine.memory.append(word)
        return machine.memory

    def reach(self) -> Machine:
        self.provider.tick()
        machine = self.provider.machines[self.id]
        assert machine.state == "running", "something was sent to a sandbox that sleeps"
        machine.frozen = False
        return machine

    async def plant(self, *, memory: bool = True) -> Sentinel | None:
        self.provider.tick()
        machine = self.provider.machines.get(self.id)
        if machine is None or machine.state != "running":
            return None
        machine.frozen = False
        count = max(machine.marks.values(), default=0) + 1
        machine.marks = {"memory": count, "files": count}
        return Sentinel(sandbox_id=self.id, count=count, memory=memory)

    async def verify(self, planted: Sentinel) -> bool:
        machine = self.reach()
        parts = {"files", "memory"} if planted.memory else {"files"}
        lost = frozenset(part for part in parts if machine.marks.get(part, 0) < planted.count)
        if lost:
            raise StateLostError("older than it was", lost=lost)
        return True

    async def run_code(self, code: str, *, timeout, on_event) -> Execution:
        return await self.provider.interpreter(self, code, on_event)


async def echo(handle: Handle, code: str, on_event) -> Execution:
    """Remembers the code and prints all it remembers."""
    said = " ".join(handle.remember(code))
    on_event(Stdout(text=said))
    return Execution(stdout=said, execution_count=1)


class Commands:
    """Shaped like `Sandbox.commands`."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.started: set[int] = set()

    async def start(self, cmd: str) -> SimpleNamespace:
        pid = next(self.handle.provider.counter)
        self.handle.reach().commands.add(pid)
        self.started.add(pid)
        return SimpleNamespace(pid=pid)

    async def list(self) -> list[SimpleNamespace]:
        self.handle.provider.tick()
        if self.handle.provider.unreachable:
            raise self.handle.provider.unreachable
        machine = self.handle.provider.machines.get(self.handle.id)
        if machine is None:
            raise NotFoundError("gone")
        if machine.state != "running":
            raise SandboxStateError("it sleeps")
        return [SimpleNamespace(pid=pid) for pid in self.handle.reach().commands]


class ProviderClient:
    """Shaped like `Client`."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.dialect = provider.dialect

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

    async def create(self, template=None, *, timeout=300, auto_pause=True, pause_memory=True, metadata=None) -> Handle:
        id = f"machine{next(self.provider.counter)}"
        error = await self._enter("create", id)
        now = self.provider.clock.time()
        machine = self.provider.machines[id] = Machine(id, dict(metadata or {}), "running", now, now + timeout)
        machine.kept = ("memory" if pause_memory else "files") if auto_pause else "nothing"
        await self._leave("create", error)
        return Handle(self.provider, id)

    async def connect(self, sandbox_id: str, *, timeout: int = 300) -> Handle:
        error = await self._enter("connect", sandbox_id)
        machine, now = self._machine(sandbox_id), self.provider.clock.time()
        machine.end = max(machine.end if machine.state == "running" else 0, now + timeout)
        machine.state, machine.frozen = "running", False
        await self._leave("connect", error)
        return Handle(self.provider, sandbox_id)

    async def pause(self, sandbox_id: str, *, memory: bool = True) -> bool:
        self.dialect.require(f"pause(memory={memory})")
        error = await self._enter("pause", sandbox_id)
        machine = self._machine(sandbox_id)
        was = machine.state
        if was == "running":
            machine.pause(self.provider.clock.time(), "memory" if memory else "files")
        await self._leave("pause", error)
        return was == "running"

    async def freeze(self, sandbox_id: str) -> bool:
        self.dialect.require("freeze")
        error = await self._enter("freeze", sandbox_id)
        machine = self._machine(sandbox_id)
        if machine.busy:
            raise ConflictError("a stream is open")
        machine.frozen = machine.state == "running"
        await self._leave("freeze", error)
        return machine.frozen

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
            cpu_count=2,
            memory_mb=512,
            expires_at=datetime.fromtimestamp(machine.end + self.provider.keeps_for, UTC)
            if self.provider.keeps_for
            else None,
        )
