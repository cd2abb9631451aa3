"""Whatever happens in whatever order, the four promises of a session hold."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sandbox_tools.errors import RequestTimeoutError, SandboxError, SandboxExpiredError, ServerError
from sandbox_tools.policy.pause import PauseAfter
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.session.transitions import HANDLE
from sandbox_tools.testing import ManualClock

from .provider import Machine, Provider, ProviderClient

processes = st.integers(0, 1)
threads = st.sampled_from(["a", "b"])


class AnyOrder(RuleBasedStateMachine):
    """Two processes, two threads, one provider that fails at times."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.provider = Provider(self.clock)
        self.foreign = Machine("foreign", {"sandbox_tools.owner": "default"}, "running", 0, 1e12)
        self.provider.machines["foreign"] = self.foreign
        self.registries: list[tuple[Sessions, SqliteBindings]] = []
        self.leases: list[tuple[int, object, object]] = []
        self.turns: list[tuple[int, str, str]] = []
        self.lost: set[str] = set()
        self.count = 0
        for _ in range(2):
            self.registries.append(self.runner.run(self.start()))

    async def start(self):
        bindings = SqliteBindings(Path(self.directory.name) / "sessions.db")
        sessions = Sessions(ProviderClient(self.provider), bindings=bindings, policy=PauseAfter(30), clock=self.clock)
        return sessions, bindings

    def session(self, process, thread):
        return self.registries[process][0].session(thread)

    @rule(process=processes, thread=threads)
    def turn_starts(self, process, thread):
        self.count += 1
        self.turns.append((process, thread, str(self.count)))
        self.runner.run(self.session(process, thread).turn_started(str(self.count)))

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def turn_ends(self, data):
        turn = data.draw(st.sampled_from(self.turns))
        self.turns.remove(turn)
        process, thread, run = turn
        self.runner.run(self.session(process, thread).turn_ended(run))

    @rule(process=processes, thread=threads)
    def tool_starts(self, process, thread):
        lease = self.session(process, thread).lease()
        try:
            sandbox = self.runner.run(self.passing_time(lease.__aenter__()))
        except SandboxError:
            return
        if sandbox.id in self.lost:
            error = SandboxExpiredError("gone since it was last seen")
            self.runner.run(lease.__aexit__(type(error), error, None))
            return
        sandbox.remember("start")
        self.leases.append((process, lease, sandbox))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def tool_ends(self, data):
        held = data.draw(st.sampled_from(self.leases))
        self.leases.remove(held)
        _process, lease, sandbox = held
        if sandbox.id not in self.lost:
            sandbox.remember("end")
        self.runner.run(lease.__aexit__(None, None, None))

    @rule(process=processes, thread=threads)
    def somebody_asks_for_a_pause(self, process, thread):
        try:
            self.runner.run(self.passing_time(self.session(process, thread).pause()))
        except SandboxError:
            pass

    @rule(
        failure=st.sampled_from(
            [
                ("create", RequestTimeoutError("late"), True),
                ("create", RequestTimeoutError("late"), False),
                ("pause", ServerError("disk full"), False),
                ("pause", RequestTimeoutError("late"), True),
                ("connect", ServerError("broken"), False),
                ("set_timeout", ServerError("broken"), False),
                ("list", ServerError("broken"), False),
            ]
        )
    )
    def the_provider_is_about_to_fail(self, failure):
        verb, error, after = failure
        self.provider.fail(verb, error, after=after)

    @rule(data=st.data())
    def a_sandbox_is_lost(self, data):
        own = sorted(set(self.provider.machines) - {"foreign"})
        if own:
            gone = data.draw(st.sampled_from(own))
            self.lost.add(gone)
            del self.provider.machines[gone]

    @rule(steps=st.integers(1, 5))
    def time_passes(self, steps):
        self.runner.run(self.pass_time(steps))

    async def pass_time(self, steps):
        for _ in range(steps):
            self.clock.advance(15)
            for sessions, _ in self.registries:
                await sessions.sweep()

    async def passing_time(self, work):
        """Its outcome; whoever waits for what a dead process held waits on a clock that goes on."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait([task], timeout=0.3)
            if not task.done():
                await self.pass_time(1)
        return task.result()

    @rule(process=processes)
    def a_process_dies_and_another_comes(self, process):
        async def die():
            sessions, bindings = self.registries[process]
            tasks = [*sessions._tasks, *([sessions._sweeping] if sessions._sweeping else [])]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            sessions._finished = True
            await bindings.aclose()
            self.registries[process] = await self.start()

        self.leases = [held for held in self.leases if held[0] != process]
        self.turns = [turn for turn in self.turns if turn[0] != process]
        self.runner.run(die())

    @precondition(lambda self: not self.leases and not self.turns)
    @rule()
    def all_sleep_in_the_end(self):
        """Idle beyond the decided time is paused, by us or, after a crash or failures, by the server's timer."""
        self.runner.run(self.pass_time(30))
        self.provider.tick()
        assert {machine.state for machine in self.provider.machines.values()} <= {"paused"} | {self.foreign.state}
        assert all(machine.state == "paused" for id, machine in self.provider.machines.items() if id != "foreign")

    @invariant()
    def what_is_leased_is_awake(self):
        self.provider.tick()
        for _process, _lease, sandbox in self.leases:
            if sandbox.id not in self.lost:
                assert self.provider.machines[sandbox.id].state == "running"

    @invariant()
    def a_thread_has_one_sandbox_at_most(self):
        handles = [machine.metadata.get(HANDLE) for machine in self.provider.machines.values()]
        assert len(handles) == len(set(handles))
        stamps = [machine.metadata.get("sandbox_tools.thread") for machine in self.provider.machines.values()]
        assert len(stamps) == len(set(stamps))

    @invariant()
    def nothing_of_others_is_touched(self):
        assert self.provider.machines["foreign"] is self.foreign
        assert self.foreign.state == "running"
        assert not any(id == "foreign" for _, id in self.provider.log)

    def teardown(self):
        async def close():
            for sessions, bindings in self.registries:
                await sessions.aclose()
                await bindings.aclose()

        self.runner.run(close())
        self.runner.close()
        self.directory.cleanup()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
