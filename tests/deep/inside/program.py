"""`dcode`, deepagents' program for the terminal, finds the provider and gets its sandboxes from it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from deepagents_code.integrations.sandbox_registry import ENTRY_POINT_GROUP, SandboxRegistry

from sandbox_tools import Client

ROOT = Path(__file__).parents[3]

# As its server does it: deleted from `atexit`.
PROGRAM = """
import atexit, sys
from deepagents_code.integrations.sandbox_factory import create_sandbox

around = create_sandbox("sandbox-tools", sandbox_id=sys.argv[1] or None)
backend = around.__enter__()
atexit.register(around.__exit__, None, None, None)
print(backend.execute("echo here >> file; cat file").output)
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    """This package as it lies here, with the metadata that its installer would write."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    metadata = tmp_path / "sandbox_tools-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sandbox-tools\nVersion: 0\n")
    lines = [f"{name} = {place}" for name, place in groups[ENTRY_POINT_GROUP].items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(path, name):
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), os.environ["PYTHONPATH"]]),
        "SANDBOX_TOOLS_STATE_DIR": os.environ["ENGINE_STATE"],
    }
    command = [sys.executable, "-c", PROGRAM, name]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


async def threads(client: Client):
    return {info.metadata["sandbox_tools.thread"]: info.state async for info in client.list()}


def test_its_registry_knows_the_provider(path):
    registry = SandboxRegistry()
    assert "sandbox-tools" in registry.available_providers()
    facts = registry.get_metadata("sandbox-tools")
    assert facts.working_dir == "/home/user"
    assert facts.supports_sandbox_id


async def test_a_sandbox_with_a_name_is_kept_and_sleeps_between_two_programs(path, client):
    name = f"mine-{secrets.token_hex(4)}"
    assert run(path, name).count("here") == 1
    assert await threads(client) == {name: "paused"}
    assert run(path, name).count("here") == 2


async def test_a_sandbox_without_a_name_is_gone_when_the_program_ends(path, client):
    said = run(path, "")
    assert "here" in said
    assert "terminated" in said
    assert await threads(client) == {}
