"""The catalogue without a framework: schemas for a model, and one coroutine for what it asks."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from sandbox_tools import PauseAfter
from sandbox_tools.errors import ConfigError
from sandbox_tools.tools.catalog import CATALOG
from sandbox_tools.tools.registry import Registry
from sandbox_tools.tools.render import RetryableByModel
from tests.tools.house import on_the_engine


@pytest.fixture
async def house(engine, tmp_path):
    async with on_the_engine(engine, tmp_path, PauseAfter(600)) as house:
        yield house


def test_schemas_are_of_the_shape_that_each_makers_api_takes(process):
    registry = Registry(process(), tools=["*"])
    theirs = registry.schemas("openai")
    assert [each["function"]["name"] for each in theirs] == [tool.name for tool in CATALOG]
    assert {each["type"] for each in theirs} == {"function"}
    assert theirs[0]["function"]["parameters"]["required"] == ["code"]
    anthropic = registry.schemas("anthropic")
    assert [each["input_schema"] for each in anthropic] == [each["function"]["parameters"] for each in theirs]
    assert all(each["input_schema"]["additionalProperties"] is False for each in anthropic)


async def test_what_a_model_asks_is_done_in_the_conversation_that_the_application_names(house):
    registry = Registry(house.sessions)
    for owner in ("ann", "bob"):
        await registry.dispatch("run_code", {"code": f"name = {owner!r}"}, owner=owner, thread="t")
    pieces = []

    async def emit(piece):
        pieces.append(piece["text"])

    done = await registry.dispatch("run_code", {"code": "print(name)"}, owner="ann", thread="t", emit=emit)
    assert done.blocks[0]["text"] == "ann"
    assert "".join(pieces) == "ann\n"


async def test_what_a_model_makes_up_is_said_to_it_and_makes_nothing(house):
    registry = Registry(house.sessions)
    for name, arguments, said in (
        ("run_cod", {}, "There are: run_code"),
        ("run_code", {}, "`code`: Field required"),
        ("run_code", {"code": "1", "owner": "bob"}, "`owner`"),
        ("run_code", {"code": "1", "timeout": -1}, "`timeout`"),
    ):
        with pytest.raises(RetryableByModel, match=said):
            await registry.dispatch(name, arguments, thread="t")
    assert await house.states() == []


def test_a_name_that_is_no_tool_is_refused_when_it_is_configured(process):
    with pytest.raises(ConfigError, match="run_cod"):
        Registry(process(), tools=["run_cod"])


def test_other_registries_find_it_by_its_entry_point():
    [found] = entry_points(group="sandbox_tools.tools")
    assert found.load() is Registry
