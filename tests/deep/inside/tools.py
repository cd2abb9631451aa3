"""langchain's own tests of what a tool is, on every tool of the catalogue, in a real sandbox."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import BaseTool
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests

from sandbox_tools import Artifacts, SandboxToolkit, Sessions

THREAD = "standard suite"

EXAMPLES: dict[str, dict[str, Any]] = {
    "run_code": {"code": "print('hello')", "timeout": 30},
    "run_command": {"command": "echo hello", "cwd": "/tmp", "timeout": 30},
    "write_file": {"path": "hello.txt", "content": "hello"},
    "read_file": {"path": "hello.txt", "first_line": 1, "lines": 10},
    "list_files": {"path": ".", "depth": 2},
    "start_job": {"command": "echo hello"},
    "read_job": {},  # which job is known once one has been started
    "stop_job": {},
    "expose_port": {"port": 8000, "minutes": 1},
    "upload_file": {"name": "attached.csv", "path": "/tmp/attached.csv"},
    "download_file": {"path": "hello.txt", "name": "greeting.txt"},
    "pause_sandbox": {},
    "list_paused_sandboxes": {},
    "resume_sandbox": {},
    "delete_sandbox": {},
}

_tools: dict[str, BaseTool] = {}


@pytest.fixture(scope="module", autouse=True)
def _catalogue(sessions: Sessions) -> Iterator[None]:
    """All tools, on a conversation with an attached file, a file of its own and a job."""
    with tempfile.TemporaryDirectory() as directory:
        artifacts = Artifacts(directory)
        toolkit = SandboxToolkit(sessions, tools=["*"], artifacts=artifacts)
        _tools.update((tool.name, tool) for tool in toolkit.get_tools())
        attached: Path = artifacts.directory("default", THREAD)
        attached.mkdir(parents=True)
        (attached / "attached.csv").write_text("a,b\n1,2\n")

        config = {"configurable": {"thread_id": THREAD}}
        _tools["write_file"].invoke(EXAMPLES["write_file"], config)
        started = {"name": "start_job", "args": EXAMPLES["start_job"], "id": "1", "type": "tool_call"}
        job = _tools["start_job"].invoke(started, config).artifact["job"]
        EXAMPLES["read_job"]["job"] = EXAMPLES["stop_job"]["job"] = job
        _tools["start_job"].invoke({"command": "python3 -m http.server 8000"}, config)
        waiting = "until (exec 3<>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep 0.1; done"
        _tools["run_command"].invoke({"command": waiting, "timeout": 60}, config)
        yield


@pytest.fixture(autouse=True)
def _run_around() -> Iterator[None]:
    """The suite passes no config: there is a run around its calls, as there is in an agent."""
    before = var_child_runnable_config.set({"configurable": {"thread_id": THREAD}})
    yield
    var_child_runnable_config.reset(before)


def test_the_suite_runs_for_each_tool_there_is() -> None:
    assert set(_tools) == set(EXAMPLES)


def _suite(suite: type, name: str) -> type:
    def constructor(self: Any) -> BaseTool:
        return _tools[name]

    def example(self: Any) -> dict[str, Any]:
        return EXAMPLES[name]

    return type(
        f"Test_{name}_{suite.__name__}",
        (suite,),
        {"tool_constructor": property(constructor), "tool_invoke_params_example": property(example)},
    )


for _name in EXAMPLES:
    for _base in (ToolsUnitTests, ToolsIntegrationTests):
        _made = _suite(_base, _name)
        globals()[_made.__name__] = _made
del _base, _made
