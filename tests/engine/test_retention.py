"""What sleeps for longer than it is kept is ended, its listing says when, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.engine.inside import EngineInside, engine_inside
from tests.machine import Box


@pytest.fixture(scope="module")
def inside(templates: Path) -> Iterator[EngineInside]:
    with engine_inside(templates) as engine:
        yield engine


@pytest.fixture
def asleep(inside: EngineInside) -> Iterator[Box]:
    box = inside.create()
    assert box.post("pause").status_code == 204
    yield box
    inside.ahead = timedelta()
    box.kill()


def expires_at(box: Box) -> datetime:
    return datetime.fromisoformat(box.info()["expiresAt"])


def test_a_paused_sandbox_says_when_it_is_deleted_and_a_running_one_that_it_is_not(inside: EngineInside) -> None:
    box = inside.create()
    assert "expiresAt" not in box.info()
    box.post("pause")
    assert expires_at(box) == datetime.fromisoformat(box.info()["endAt"]) + timedelta(days=30)
    with inside.http() as http:
        [listed] = http.get("/v2/sandboxes").json()
    assert listed["expiresAt"] == box.info()["expiresAt"]
    box.kill()


def test_it_is_there_until_then_and_its_time_begins_anew_with_each_pause(inside: EngineInside, asleep: Box) -> None:
    inside.ahead = timedelta(days=29.9)
    inside.do(inside.supervisor.retention.look())
    assert asleep.post("connect", timeout=600).status_code == 201
    assert asleep.post("pause").status_code == 204
    inside.ahead = timedelta(days=59.8)
    inside.do(inside.supervisor.retention.look())
    assert asleep.info()["state"] == "paused"


def test_after_it_nothing_is_left_and_whoever_asks_is_told_why(inside: EngineInside, asleep: Box) -> None:
    running = inside.create(timeout=24 * 3600)
    inside.ahead = timedelta(days=30.1)
    inside.do(inside.supervisor.retention.look())
    answer = asleep.post("connect", timeout=600)
    assert answer.status_code == 404
    assert "paused for longer than the 30 days" in answer.json()["message"]
    assert not (inside.state / "sandboxes" / asleep.id).exists()
    inside.ahead = timedelta()
    running.kill()


def test_it_is_not_resumed_in_the_hour_before_somebody_looks(inside: EngineInside, asleep: Box) -> None:
    inside.ahead = timedelta(days=30.1)
    assert asleep.post("connect", timeout=600).status_code == 404
    assert not (inside.state / "sandboxes" / asleep.id).exists()


def test_kept_for_ever_it_never_expires(inside: EngineInside, asleep: Box) -> None:
    inside.supervisor.retention.days = 0
    try:
        inside.ahead = timedelta(days=3000)
        inside.do(inside.supervisor.retention.look())
        assert "expiresAt" not in asleep.info()
    finally:
        inside.supervisor.retention.days = 30
