"""Every store keeps the same rules as a model of them in plain Python, in any order of calls."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from sandbox_tools.session.bindings import Bindings, MemoryBindings, PostgresBindings
from sandbox_tools.session.rows import Binding
from tests.session.stores import empty_database

THREADS = [("ann", "t"), ("ann", "u"), ("bob", "t")]
EXPIRY = 60.0


@dataclass
class Row:
    """What the model knows of one sandbox."""

    owner: str
    fence: int = 0
    holder: str | None = None
    held_until: float = 0.0
    sandbox_id: str | None = None
    state: str = "new"
    idle_since: float = 0.0


@dataclass
class Use:
    """What it knows of one use."""

    kind: str
    holder: str
    thread: tuple[str, str]
    handle: str | None
    until: float


@dataclass
class Model:
    """The rules."""

    rows: dict[str, Row] = field(default_factory=dict)
    threads: dict[tuple[str, str], str | None] = field(default_factory=dict)
    losses: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    uses: dict[str, Use] = field(default_factory=dict)
    now: float = 1000.0

    def refused(self, handle: str, unless: str) -> bool:
        live = [use for use in self.uses.values() if use.until > self.now]
        direct = [use for use in live if use.handle == handle]
        turns = [use for use in live if use.handle is None and self.threads.get(use.thread) == handle]
        if unless == "leased":
            return any(use.kind == "lease" for use in direct)
        return unless == "used" and bool(direct or turns)

    def free(self, handle: str) -> bool:
        row = self.rows.get(handle)
        return row is not None and (row.holder is None or row.held_until <= self.now)


class Rules(RuleBasedStateMachine):
    """Calls one store and the model with the same."""

    place: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.held: list[Binding] = []
        self.names = 0

    @initialize()
    def begin(self) -> None:
        self.bindings: Bindings = PostgresBindings(empty_database(self.place)) if self.place else MemoryBindings()

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        return self.runner.run(getattr(self.bindings, name)(*arguments, **named))

    def handles(self) -> list[str]:
        return [*self.model.rows, *self.model.rows, "sbx-unknown"]

    @rule(thread=st.sampled_from(THREADS))
    def current(self, thread: tuple[str, str]) -> None:
        found = self.call("current", *thread, self.model.now)
        known = self.model.threads.get(thread)
        if known is None:
            assert found.handle not in self.model.rows
            self.model.rows[found.handle] = Row(owner=thread[0], idle_since=self.model.now)
            self.model.threads[thread] = found.handle
        else:
            assert found.handle == known

    @rule(data=st.data(), thread=st.sampled_from(THREADS), holder=st.sampled_from(("p1", "p2")))
    def lease(self, data: st.DataObject, thread: tuple[str, str], holder: str) -> None:
        handle = data.draw(st.sampled_from(self.handles()))
        self.names += 1
        until = self.model.now + EXPIRY
        found = self.call(
            "begin_lease", *thread, handle, use=f"u{self.names}", holder=holder, now=self.model.now, until=until
        )
        allowed = self.model.free(handle) and self.model.rows[handle].owner == thread[0]
        assert (found is not None) == allowed
        if allowed:
            self.model.uses[f"u{self.names}"] = Use("lease", holder, thread, handle, until)

    @rule(thread=st.sampled_from(THREADS), holder=st.sampled_from(("p1", "p2")))
    def turn(self, thread: tuple[str, str], holder: str) -> None:
        self.names += 1
        until = self.model.now + EXPIRY
        self.call("begin_turn", *thread, use=f"u{self.names}", holder=holder, now=self.model.now, until=until)
        self.model.uses[f"u{self.names}"] = Use("turn", holder, thread, None, until)

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), thread=st.sampled_from(THREADS), seconds=st.sampled_from((5.0, 500.0)))
    def hold(self, data: st.DataObject, thread: tuple[str, str], seconds: float) -> None:
        handle = data.draw(st.sampled_from(list(self.model.rows)))
        until = self.model.now + seconds
        self.call("hold", *thread, handle, use=f"h-{handle}", pid=None, until=until)
        self.model.uses[f"h-{handle}"] = Use("hold", "", thread, handle, until)
        assert [each.until for each in self.call("holds", handle, self.model.now)] == [until]

    @precondition(lambda self: self.model.uses)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.model.uses, "unknown"]))
        use = self.model.uses.pop(name, None)
        expected = None if use is None else use.handle or self.model.threads.get(use.thread)
        assert self.call("end_use", name, self.model.now) == expected
        if expected in self.model.rows:
            self.model.rows[expected].idle_since = self.model.now

    @rule(data=st.data(), holder=st.sampled_from(("p1", "p2")), unless=st.sampled_from(("nothing", "leased", "used")))
    def take(self, data: st.DataObject, holder: str, unless: str) -> None:
        handle, now = data.draw(st.sampled_from(self.handles())), self.model.now
        held = self.call("begin_transition", handle, holder=holder, now=now, until=now + EXPIRY, unless=unless)
        allowed = self.model.free(handle) and not self.model.refused(handle, unless)
        assert (held is not None) == allowed
        if held is not None:
            row = self.model.rows[handle]
            row.fence, row.holder, row.held_until = row.fence + 1, holder, now + EXPIRY
            assert (held.fence, held.sandbox_id, held.state) == (row.fence, row.sandbox_id, row.state)
            self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), state=st.sampled_from(("running", "frozen", "paused")))
    def finish(self, data: st.DataObject, state: str) -> None:
        held = data.draw(st.sampled_from(self.held))
        sandbox_id = held.sandbox_id or f"s-{held.handle}"
        done = self.call("end_transition", held, state=state, sandbox_id=sandbox_id)
        row = self.model.rows.get(held.handle)
        assert done == (row is not None and row.fence == held.fence)
        if row is not None and done:
            row.holder, row.held_until, row.state, row.sandbox_id = None, 0.0, state, sandbox_id

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held))
        self.call("abandon", held)
        row = self.model.rows.get(held.handle)
        if row is not None and row.fence == held.fence and row.holder is not None:
            row.holder, row.held_until = None, 0.0
            row.state = "unknown" if row.state in ("running", "frozen") else row.state

    @precondition(lambda self: self.held)
    @rule(data=st.data(), lost=st.booleans())
    def forget(self, data: st.DataObject, lost: bool) -> None:
        held = data.draw(st.sampled_from(self.held))
        row = self.model.rows.get(held.handle)
        done = self.call("forget", held, lost=lost)
        assert done == (row is not None and row.fence == held.fence)
        if done:
            del self.model.rows[held.handle]
            for name in [name for name, use in self.model.uses.items() if use.handle == held.handle]:
                if self.model.uses[name].kind == "hold":
                    del self.model.uses[name]
            for thread, handle in self.model.threads.items():
                if handle == held.handle:
                    self.model.threads[thread] = None
                    if lost:
                        self.model.losses.setdefault(thread, set()).add("sandbox")

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), thread=st.sampled_from(THREADS))
    def point(self, data: st.DataObject, thread: tuple[str, str]) -> None:
        own = [handle for handle, row in self.model.rows.items() if row.owner == thread[0]]
        handle = data.draw(st.sampled_from([*own, None]))
        self.call("point", *thread, handle)
        self.model.threads[thread] = handle

    @rule(thread=st.sampled_from(THREADS))
    def lost(self, thread: tuple[str, str]) -> None:
        assert self.call("take_lost", *thread) == self.model.losses.pop(thread, set())

    @rule(seconds=st.sampled_from((1.0, 10.0, 30.0, 61.0)))
    def wait(self, seconds: float) -> None:
        self.model.now += seconds

    @rule(data=st.data(), holder=st.sampled_from(("p1", "p2")))
    def renew(self, data: st.DataObject, holder: str) -> None:
        until = self.model.now + EXPIRY
        handles = data.draw(st.sets(st.sampled_from(self.handles())))
        self.call("renew", holder, transitions=handles, now=self.model.now, until=until)
        for use in self.model.uses.values():
            use.until = until if use.holder == holder else use.until
        for handle in handles & self.model.rows.keys():
            row = self.model.rows[handle]
            row.held_until = until if row.holder == holder else row.held_until

    @rule(owner=st.sampled_from(("ann", "bob")))
    def look(self, owner: str) -> None:
        found = {each.handle: (each.sandbox_id, each.state, each.fence) for each in self.call("of_owner", owner)}
        rows = self.model.rows.items()
        assert found == {handle: (row.sandbox_id, row.state, row.fence) for handle, row in rows if row.owner == owner}

    @rule(past=st.sampled_from((0.0, 40.0)))
    def neglected(self, past: float) -> None:
        before = self.model.now - past
        expected = {
            handle
            for handle, row in self.model.rows.items()
            if row.sandbox_id is not None
            and row.state in ("running", "frozen", "unknown")
            and self.model.free(handle)
            and not self.model.refused(handle, "used")
            and row.idle_since <= before
        }
        assert set(self.call("list_idle", before, self.model.now)) == expected

    def teardown(self) -> None:
        if hasattr(self, "bindings"):
            self.call("aclose")
        self.runner.close()


@pytest.mark.parametrize(("store", "examples"), [("memory", 250), ("postgres", 25)])
def test_a_store_keeps_the_rules_in_any_order_of_calls(
    store: str, examples: int, request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue("postgres") if store == "postgres" else None
    machine = type("Machine", (Rules,), {"place": place})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
