"""Whatever happens in whatever order, the promises of a session hold."""

from __future__ import annotations

import asyncio

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sandbox_tools.errors import RequestTimeoutError, SandboxError, SandboxExpiredError, ServerError
from sandbox_tools.policy.adaptive import AdaptivePause
from sandbox_tools.policy.pause import PauseAfter
from sandbox_tools.session.bindings import MemoryBindings
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.session.stamps import HANDLE, OWNER, THREAD
from sandbox_tools.testing import ManualClock

from .provider import Machine, Provider, ProviderClient
from .test_state import FreezeFirst

EXPIRY = 60.0

processes = st.integers(0, 1)
threads = st.sampled_from(["a", "b"])
which = st.integers(0, 7)
policies = st.sampled_from([PauseAfter(30), PauseAfter(0), FreezeFirst(30), AdaptivePause()])

FAILURES = [
    ("create", RequestTimeoutError("late"), True),
    ("create", RequestTimeoutError("late"), False),
    ("pause", ServerError("disk full"), False),
    ("pause", RequestTimeoutError("late"), True),
    ("freeze", ServerError("broken"), False),
    ("connect", ServerError("broken"), False),
    ("connect", RequestTimeoutError("late"), True),
    ("set_timeout", ServerError("broken"), False),
    ("list", ServerError("broken"), False),
    ("info", ServerError("broken"), False),
]


class Inline(MemoryBindings):
    """Without a thread between a call and its outcome: the same choices lead to the same course of events."""

    def __init__(self) -> None:
        super().__init__()
        transact = self._database._transact

        async def at_once(work, *, key=None):
            await asyncio.sleep(0)
            return transact(work)

        self._transact = self._database.transact = at_once


class AnyOrder(RuleBasedStateMachine):
    """Two processes, two threads, one provider that fails at times."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.provider = Provider(self.clock)
        others = [
            Machine("unstamped", {}, "running", 0, 1e12),
            Machine("half", {OWNER: "default"}, "running", 0, 1e12),
            Machine("bobs", {OWNER: "bob", THREAD: "a", HANDLE: "sbx-bob"}, "running", 0, 1e12),
        ]
        self.others = {machine.id: machine for machine in others}
        self.provider.machines.update(self.others)
        self.bindings = Inline()
        self.registries: list[Sessions] = []
        self.leases: list[tuple[int, object, object]] = []
        self.turns: list[tuple[int, str, str]] = []
        self.remembered: dict[str, list[str]] = {}
        self.lost: set[str] = set()
        self.count = 0
        self.made = {"a": 1, "b": 1}
        self.doubtful_until = self.held_until = 0.0
        self.awake_until: dict[str, float] = {}

    @initialize(policy=policies, failure=st.sampled_from([None, *FAILURES[:2]]))
    def two_processes_begin(self, policy, failure):
        self.policy = policy
        if failure:
            self.the_provider_is_about_to_fail(failure)
        self.registries = [self.runner.run(self.start()) for _ in range(2)]
        for process, thread in enumerate("ab"):
            self.a_whole_turn(process, thread, 0)

    async def start(self):
        sessions = Sessions(
            ProviderClient(self.provider),
            bindings=self.bindings,
            policy=self.policy,
            clock=self.clock,
            expiry=EXPIRY,
        )
        sessions.on_own_loop()
        return sessions

    def session(self, process, thread):
        return self.registries[process].session(thread)

    def own(self):
        return {id: machine for id, machine in self.provider.machines.items() if id not in self.others}

    def attempt(self, work):
        try:
            return self.runner.run(self.passing_time(work))
        except SandboxError:
            return None

    @rule(process=processes, thread=threads)
    def turn_starts(self, process, thread):
        self.count += 1
        self.turns.append((process, thread, str(self.count)))
        self.runner.run(self.session(process, thread).turn_started(str(self.count)))

    @rule(which=which)
    def turn_ends(self, which):
        if not self.turns:
            return
        process, thread, run = self.turns.pop(which % len(self.turns))
        self.runner.run(self.passing_time(self.session(process, thread).turn_ended(run)))

    @rule(process=processes, thread=threads, seconds=st.sampled_from([0, 3, 31, 50]))
    def a_whole_turn(self, process, thread, seconds):
        """With one tool call, and some time after it."""

        async def turn():
            async with self.session(process, thread).turn() as session, session.lease() as sandbox:
                if sandbox.id in self.lost:
                    raise SandboxExpiredError("gone since it was last seen")
                self.remember(sandbox, "turn")

        self.attempt(turn())
        self.clock.advance(seconds)
        self.runner.run(self.sweep())

    @rule(process=processes, thread=threads)
    def tool_starts(self, process, thread):
        lease = self.session(process, thread).lease()
        sandbox = self.attempt(lease.__aenter__())
        if sandbox is None:
            return
        if sandbox.id in self.lost:
            error = SandboxExpiredError("gone since it was last seen")
            self.runner.run(lease.__aexit__(type(error), error, None))
            return
        self.remember(sandbox, "start")
        self.leases.append((process, lease, sandbox))

    @rule(which=which, background=st.booleans())
    def tool_ends(self, which, background):
        if not self.leases:
            return
        _process, lease, sandbox = self.leases.pop(which % len(self.leases))
        if sandbox.id not in self.lost:
            self.remember(sandbox, "end")
            if background:
                self.runner.run(sandbox.commands.start("make"))
                self.awake_until[sandbox.id] = float("inf")
        self.runner.run(lease.__aexit__(None, None, None))

    def remember(self, sandbox, word):
        """Nothing is lost: what a sandbox remembers is all that was ever said to it."""
        expected = [*self.remembered.get(sandbox.id, []), word]
        assert sandbox.remember(word) == expected
        self.remembered[sandbox.id] = expected

    @rule(process=processes, thread=threads)
    def somebody_asks_for_a_pause(self, process, thread):
        self.attempt(self.session(process, thread).pause())
        self.awake_until.clear()  # it wins over what holds the sandbox

    @rule(process=processes, thread=threads, seconds=st.sampled_from([0.0, 20.0, 100.0]))
    def somebody_holds(self, process, thread, seconds):
        self.held_until = max(self.held_until, self.clock.time() + seconds)
        self.attempt(self.session(process, thread).hold(seconds))
        current = self.runner.run(self.bindings.find("default", thread))
        machine = self.provider.machines.get(current.sandbox_id) if current else None
        if machine is not None and machine.state == "running":
            self.awake_until.setdefault(machine.id, self.clock.time() + seconds)

    @rule(process=processes, thread=threads)
    def somebody_wants_another_sandbox(self, process, thread):
        self.attempt(self.session(process, thread).new())
        self.made[thread] += 1

    @rule(which=which, process=processes, thread=threads)
    def what_sleeps_is_reached_again(self, which, process, thread):
        asleep = sorted(id for id, machine in self.own().items() if machine.state == "paused")
        if not asleep or self.provider.failing():
            return
        machine = self.provider.machines[asleep[which % len(asleep)]]
        session = self.session(process, thread)
        assert self.runner.run(self.passing_time(session.resume(machine.metadata[HANDLE])))
        lease = session.lease()
        sandbox = self.runner.run(self.passing_time(lease.__aenter__()))
        assert sandbox.id == machine.id
        self.made[thread] += 1  # it leaves the one it had, and may lose this one
        self.remember(sandbox, "again")
        self.runner.run(lease.__aexit__(None, None, None))

    @rule()
    def commands_end(self):
        self.awake_until.clear()
        for machine in self.own().values():
            machine.commands.clear()

    @rule(failure=st.sampled_from(FAILURES))
    def the_provider_is_about_to_fail(self, failure):
        verb, error, after = failure
        self.provider.failures.clear()
        self.provider.fail(verb, error, after=after)
        self.doubtful_until = float("inf")

    @rule()
    def the_provider_has_recovered(self):
        """What failed is tried again within half a minute."""
        self.provider.failures.clear()
        self.doubtful_until = self.clock.time() + 31

    @rule(which=which)
    def a_sandbox_is_lost(self, which):
        if own := sorted(self.own()):
            gone = own[which % len(own)]
            self.lost.add(gone)
            del self.provider.machines[gone]

    @rule(steps=st.integers(1, 5))
    def time_passes(self, steps):
        self.runner.run(self.pass_time(steps))

    async def pass_time(self, steps, seconds=15):
        for _ in range(steps):
            self.clock.advance(seconds)
            await self.sweep()

    async def sweep(self):
        for sessions in self.registries:
            await sessions.sweep()
        # Some wait for what a dead process held, and that for the clock to go on.
        while tasks := {task for sessions in self.registries for task in sessions._tasks}:
            if not (await asyncio.wait(tasks, timeout=0.3))[0]:
                break

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
            sessions = self.registries[process]
            tasks = [*sessions._tasks, sessions._sweeping]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            sessions.finished = True
            self.registries[process] = await self.start()

        self.leases = [held for held in self.leases if held[0] != process]
        self.turns = [turn for turn in self.turns if turn[0] != process]
        self.runner.run(die())
        self.doubtful_until = max(self.doubtful_until, self.clock.time() + EXPIRY + 10)

    @rule()
    def past_the_decided_time_one_sweep_pauses(self):
        """That is ours to do: the server's timer, which is the net, comes later."""
        self.all_that_is_open_ends()
        if self.clock.time() < max(self.doubtful_until, self.held_until):
            return
        self.commands_end()

        async def one_sweep():
            await self.sweep()
            self.clock.advance(31)  # whoever asked after a command asks again
            await self.sweep()
            rows = await self.bindings.of_owner("default")
            self.clock.advance(max([0.0, *(row.due_at - self.clock.time() for row in rows if row.due_at)]))
            await self.sweep()

        self.runner.run(one_sweep())
        assert {machine.state for machine in self.own().values()} <= {"paused"}

    def all_that_is_open_ends(self):
        while self.leases:
            self.tool_ends(0, False)
        while self.turns:
            self.turn_ends(0)

    @rule()
    def all_sleep_in_the_end(self):
        """By us or, after a crash or failures, by the server's timer."""
        self.all_that_is_open_ends()
        self.commands_end()
        self.runner.run(self.pass_time(6, 700))
        self.provider.tick()
        assert all(machine.state == "paused" for machine in self.own().values())

    @invariant()
    def what_is_leased_is_awake(self):
        self.provider.tick()
        for _process, _lease, sandbox in self.leases:
            if sandbox.id not in self.lost:
                machine = self.provider.machines[sandbox.id]
                assert (machine.state, machine.frozen) == ("running", False)

    @invariant()
    def what_is_held_is_awake(self):
        for id, until in self.awake_until.items():
            if self.clock.time() < until and self.clock.time() >= self.doubtful_until and id not in self.lost:
                assert self.provider.machines[id].state == "running"

    @invariant()
    def a_thread_has_one_sandbox_at_most_unless_it_asked_for_more(self):
        handles = [machine.metadata[HANDLE] for machine in self.own().values()]
        assert len(handles) == len(set(handles))
        for thread, made in self.made.items():
            assert sum(machine.metadata[THREAD] == thread for machine in self.own().values()) <= made

    @invariant()
    def nothing_of_others_is_touched(self):
        for id, machine in self.others.items():
            assert self.provider.machines[id] is machine
            assert machine.state == "running"
        assert not any(id in self.others for _, id in self.provider.log)

    def teardown(self):
        async def close():
            for sessions in self.registries:
                await sessions.aclose()
            await self.bindings.aclose()

        self.runner.run(close())
        self.runner.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=260, stateful_step_count=45, deadline=None, suppress_health_check=list(HealthCheck)
)
"""More than 10,000 steps."""
