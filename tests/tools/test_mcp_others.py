"""The MCP server before what others made: the protocol's own conformance tool, and LangChain's client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.sdk.environments import environment
from tests.tools.test_mcp_http import Served

ROOT = Path(__file__).parents[2]

SCENARIOS = {
    "server-initialize": 1,
    "ping": 1,
    "tools-list": 1,
    "resources-list": 1,
    "prompts-list": 1,
    "server-sse-multiple-streams": 2,
    "dns-rebinding-protection": 2,
}
"""Those that need no tools, resources or prompts of the tool's own, and how many checks each has."""


@pytest.fixture
async def served(engine, tmp_path):
    served = Served(engine, tmp_path)
    try:
        await served.ready()
        yield served
    finally:
        served.stop()


async def test_the_scenarios_that_apply_pass(served):
    home = await asyncio.to_thread(environment, "conformance")
    tool = [home / "bin" / "node", home / "node_modules" / ".bin" / "conformance", "server", "--url", served.url]

    async def passed(scenario):
        command = [*tool, "--scenario", scenario]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
        counted = re.search(r"Passed: (\d+)/(\d+), 0 failed", done.stdout)
        assert counted, f"{scenario}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return int(counted[1])

    assert {scenario: await passed(scenario) for scenario in SCENARIOS} == SCENARIOS


async def test_a_scripted_agent_uses_the_tools_through_langchains_own_client(served, engine):
    home = await asyncio.to_thread(environment, "langchain-mcp")
    command = [home / "bin" / "python", ROOT / "tests" / "tools" / "agent_over_mcp.py", served.url]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr
    first, second, made_up = done.stdout.splitlines()
    assert first == "success The code ran and put nothing out."
    assert second == "success 42"
    assert made_up.startswith("error")
    assert "owner" in made_up
    engine.clear()


def test_the_registrys_file_names_what_the_readme_and_the_package_do():
    described = json.loads((ROOT / "server.json").read_text())
    assert f"mcp-name: {described['name']} " in (ROOT / "README.md").read_text()
    assert len(described["description"]) <= 100
    [package] = described["packages"]
    assert package["identifier"] == "sandbox-tools"
    assert described["version"] == package["version"] == version("sandbox-tools")
