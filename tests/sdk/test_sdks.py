"""Clients that nobody here wrote take the engine for the real service: a test for each promise and SDK."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.sdk import async_life, async_use, sync_life, sync_use
from tests.sdk.conftest import ROOT, SDKS, Scenario
from tests.sdk.environments import HERE, JAVASCRIPT

PROMISES = [*sync_use.step.names(), *sync_life.step.names()]


def test_every_sdk_is_asked_for_the_same() -> None:
    javascript = [
        promise
        for name in ("use.mjs", "life.mjs")
        for promise in re.findall(r"^step\('(\w+)'", (JAVASCRIPT / name).read_text(), re.MULTILINE)
    ]
    assert [*async_use.step.names(), *async_life.step.names()] == PROMISES
    assert javascript == PROMISES


def test_each_line_of_what_is_supported_names_the_steps_that_show_it() -> None:
    lines = [line.split("|") for line in (HERE / "SUPPORT.md").read_text().splitlines() if line.startswith("|")]
    supported = [cells for cells in lines if len(cells) == 9][2:]
    shown = [re.findall(r"`(\w+)`", cells[-2]) for cells in supported]
    assert all(shown)
    assert {name for names in shown for name in names} <= set(PROMISES)

    readme = (ROOT / "README.md").read_text().splitlines()
    assert {"|".join(cells[:-2]) + "|" for cells in supported} <= set(readme)


def _test_of(promise: str) -> Callable[[Scenario], None]:
    @pytest.mark.parametrize("sdk", SDKS, indirect=True, scope="session")
    def test(sdk: Scenario) -> None:
        told = sdk.steps.get(promise)
        assert told is not None, f"The scenario ended before this step: {sdk.ending}"
        if told.outcome == "absent":
            pytest.skip(told.words)
        assert told.outcome == "kept", told.words

    test.__name__ = f"test_{promise}"
    return test


for _promise in PROMISES:
    globals()[f"test_{_promise}"] = _test_of(_promise)
