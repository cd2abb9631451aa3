"""Whatever an engine does when it is killed, the next one has each sandbox: resumable, running, or known as gone."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import own_state
from tests.machine import Box, EngineProcess

VERBS = ("run", "run", "freeze", "pause", "connect", "kill", "create")

# In memory and in a file, at once: where they differ something was done by halves, or twice.
COUNT = "n = globals().get('n', 0) + 1; open('/home/user/n', 'w').write(str(n)); n"
LOOK = (
    "f = __import__('pathlib').Path('/home/user/n'); "
    "globals().get('n', 0), int(f.read_text() or 0) if f.exists() else 0"
)


@dataclass
class Known:
    """A sandbox, and what its user knows of it: runs that were answered, and those that were begun."""

    box: Box
    answered: int = 0
    begun: int = 0
    kill: str = ""
    """`begun`, then `answered`."""


@dataclass
class User:
    """Somebody who does one thing after the other to sandboxes of their own, until the engine dies under them."""

    engine: EngineProcess
    chance: random.Random
    mine: list[Known]
    trouble: list[str]

    def live(self) -> None:
        """Until the engine is gone."""
        with contextlib.suppress(httpx.TransportError, json.JSONDecodeError, StopIteration):
            try:
                while True:
                    self.step()
            except AssertionError as error:
                self.trouble.append(str(error))

    def step(self) -> None:
        alive = [known for known in self.mine if not known.kill]
        verb = self.chance.choice(VERBS) if alive else "create"
        if verb == "create":
            if len(alive) < 2:
                self.mine.append(Known(self.engine.create(autoPause=True)))
            return

        known = self.chance.choice(alive)
        if verb == "run":
            if known.box.info()["state"] == "paused":
                known.box.post("connect", timeout=600)
            known.begun += 1
            if known.box.value(COUNT) != str(known.begun):
                self.trouble.append(f"{known.box.id}: run {known.begun} was not the one after the last")
            known.answered += 1
        elif verb == "kill":
            if self.chance.random() < 0.3:
                known.kill = "begun"
                known.box.kill()
                known.kill = "answered"
        else:
            status = known.box.post(verb, **({"timeout": 600} if verb == "connect" else {})).status_code
            # A pause of what is paused, or a freeze of what is in use.
            if status not in (200, 201, 204, 409):
                self.trouble.append(f"{known.box.id}: {verb} was answered with {status}")


def check(engine: EngineProcess, users: list[User]) -> None:
    """All that must be so once the next engine is ready."""
    rows = {row["sandboxID"]: row for row in engine.rows()}
    known = {each.box.id: each for user in users for each in user.mine}
    for sandbox_id, each in known.items():
        assert each.kill or sandbox_id in rows, f"{sandbox_id} is gone, and nobody killed it"
        assert each.kill != "answered" or sandbox_id not in rows, f"{sandbox_id} was killed, and is there"
    # As many run as have a process, and as many snapshots lie there as are needed.
    running = sorted(name for name, row in rows.items() if row["state"] == "running")
    assert sorted(name.rpartition("-")[0] for name in engine.containers()) == running
    for name, row in rows.items():
        images = [path.name for path in (engine.state / "snapshots" / name).glob("*")]
        assert len(images) == (1 if row["state"] == "paused" else 0), images
    assert {path.name for path in (engine.state / "sandboxes").iterdir()} == set(rows)
    assert engine.plain_images() == []

    for sandbox_id in rows:
        # One whose create was not answered is nobody's, but whole.
        each = known.get(sandbox_id) or Known(Box(engine, {"sandboxID": sandbox_id, "envdAccessToken": ""}), begun=0)
        answer = each.box.post("connect", timeout=600)
        assert answer.status_code in (200, 201), answer.text
        each.box.token = answer.json()["envdAccessToken"]
        counted, written = json.loads("[" + each.box.value(LOOK).strip("()") + "]")
        assert each.answered <= counted <= each.begun, f"{sandbox_id} counted {counted}, and its user {each}"
        # What was interrupted between the two was not done by halves twice.
        assert written in (counted, counted - 1)
        each.begun = each.answered = counted
        # A kill that was not answered need not have been done: then it is theirs as before.
        each.kill = ""
        if written != counted:
            each.box.run(f"open('/home/user/n', 'w').write({str(counted)!r})")


@contextlib.contextmanager
def an_engine() -> Iterator[EngineProcess]:
    with own_state() as state:
        engine = EngineProcess(state, options=("--keep-history", "0")).start()
        try:
            yield engine
        finally:
            engine.clear()
            engine.stop()
            assert engine.containers() == []


def go_through(seed: int, deaths: int, users: int) -> None:
    chance = random.Random(seed)
    with an_engine() as engine:
        people = [User(engine, random.Random(chance.random()), [], []) for _ in range(users)]
        for _ in range(deaths):
            living = [threading.Thread(target=user.live) for user in people]
            for each in living:
                each.start()
            threading.Event().wait(chance.uniform(0.2, 4.0))
            engine.kill()
            for each in living:
                each.join()
            assert [trouble for user in people for trouble in user.trouble] == []
            engine.start()
            check(engine, people)
            for user in people:
                user.mine = [each for each in user.mine if not each.kill]


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_an_engine_killed_at_any_moment_of_anything_loses_and_doubles_nothing(templates: Path, seed: int) -> None:
    go_through(seed, deaths=2, users=2)


@pytest.mark.soak
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_an_engine_killed_again_and_again_loses_and_doubles_nothing(templates: Path, seed: int) -> None:
    go_through(seed, deaths=8, users=3)
