"""Several registries stand for several processes: they share a bindings file, a provider and a clock, nothing else."""

from __future__ import annotations

import pytest

from sandbox_tools.policy.pause import PauseAfter
from sandbox_tools.session.bindings import SqliteBindings
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.testing import ManualClock

from .provider import Provider, ProviderClient


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def provider(clock):
    return Provider(clock)


@pytest.fixture
async def process(tmp_path, clock, provider):
    """Makes one registry more on the same file."""
    made = []

    def make(policy=None, **more):
        bindings = SqliteBindings(tmp_path / "sessions.db")
        policy = policy or PauseAfter(30)
        sessions = Sessions(ProviderClient(provider), bindings=bindings, policy=policy, clock=clock, **more)
        made.append((sessions, bindings))
        return sessions

    yield make
    for gate in provider.gates.values():
        gate.set()
    for sessions, bindings in made:
        await sessions.aclose()
        await bindings.aclose()
