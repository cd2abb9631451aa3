"""What a policy learns and what a report tells comes from what really happened, once."""

from __future__ import annotations

import math

from sandbox_tools.policy.pause import PauseAfter
from sandbox_tools.policy.tally import Tally

from .test_sessions import quiet, use


class Listener(PauseAfter):
    """Learns nothing, and notes what it is told."""

    def __init__(self):
        super().__init__(30)
        self.priced, self.learned, self.terms = [], [], None

    def plan(self, idle, pool=None, own=None):
        self.terms = idle.terms
        return super().plan(idle, pool, own)

    def horizon(self, terms):
        return 600

    def price(self, period, terms):
        self.priced.append(period)
        return Tally(played=1.0)

    def learn(self, period, terms):
        self.learned.append(period)
        return Tally(count=1, costs=[0.0] * 91)


async def turns(sessions, clock, gaps, lead=6.0):
    session = sessions.session("t")
    for gap in [*gaps, None]:
        async with session.turn():
            await quiet(sessions)
            clock.advance(lead)
            await use(session)
        await quiet(sessions)
        if gap is not None:
            clock.advance(gap)
            await sessions.sweep()
            await quiet(sessions)


async def test_each_idle_period_is_told_with_its_gap_its_lead_and_its_threshold(process, clock):
    policy = Listener()
    sessions = process(policy)
    await turns(sessions, clock, [5.0, 100.0])
    clock.advance(601)
    await sessions.sweep()
    assert [(period.gap, period.lead, period.threshold) for period in policy.learned] == [
        (5.0, 6.0, 30),
        (100.0, 6.0, 30),
        (math.inf, math.inf, 30),
    ]


async def test_losses_are_told_when_a_period_is_over_and_lessons_at_the_horizon(process, clock):
    policy = Listener()
    sessions = process(policy)
    await turns(sessions, clock, [100.0])
    clock.advance(15)
    await sessions.sweep()
    assert [(period.gap, period.lead) for period in policy.priced] == [(100.0, 6.0)]
    assert policy.learned == []
    clock.advance(600)
    await sessions.sweep()
    assert [period.priced for period in policy.learned] == [True, False]


async def test_what_two_processes_have_seen_is_learned_once(process, clock):
    first, second = Listener(), Listener()
    mine, other = process(first), process(second)
    await turns(mine, clock, [5.0])
    await turns(other, clock, [5.0])
    clock.advance(700)
    await mine.sweep()
    await other.sweep()
    assert len(first.learned) + len(second.learned) == 4
    pool, own = await mine.bindings.tallies("default", first.terms.key)
    assert (pool.count, own.count) == (4, 4)


async def test_a_turn_without_a_tool_call_has_no_lead(process, clock):
    policy = Listener()
    sessions = process(policy)
    session = sessions.session("t")
    await use(session)
    await quiet(sessions)
    clock.advance(10)
    async with session.turn():
        await quiet(sessions)
    clock.advance(700)
    await sessions.sweep()
    assert [(period.gap, period.lead) for period in policy.learned] == [(10.0, math.inf), (math.inf, math.inf)]


async def test_the_account_of_a_sandbox_adds_up(process, clock):
    sessions = process(PauseAfter(30))
    session = sessions.session("t", owner="ann")
    async with session.turn():
        await use(session)
        clock.advance(20)
    await quiet(sessions)
    clock.advance(30)
    await sessions.sweep()
    clock.advance(1000)
    async with session.turn():
        await use(session)
    await quiet(sessions)
    ((_, owner, thread, account),) = await sessions.bindings.accounts()
    assert (owner, thread) == ("ann", "t")
    assert (account.running + account.frozen, account.paused) == (50.0, 1000.0)
    assert (account.pauses, account.resumes) == (1, 1)
    assert account.spent < account.timer < account.always_on
    await session.kill()
    assert [row[3].state for row in await sessions.bindings.accounts("ann")] == ["killed"]


async def test_measured_times_replace_the_documents(process, provider, clock):
    policy = Listener()
    sessions = process(policy)
    session = sessions.session("t")
    await use(session)
    await quiet(sessions)
    before = policy.terms.pause_seconds
    sessions.evidence.pause_took(before * 7)
    clock.advance(1)
    await use(session)
    await quiet(sessions)
    assert policy.terms.pause_seconds == before * 7
