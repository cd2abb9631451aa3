"""The examples, run as a reader would run them, each process its own, against a real engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_tools import Client
from tests.machine import EngineProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, engine: EngineProcess) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SANDBOX_TOOLS_STATE_DIR": str(engine.state), "COLUMNS": "160"}
    words = [sys.executable, EXAMPLES / name]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


async def sandboxes(engine: EngineProcess) -> list[str]:
    async with Client(provider="local", state_dir=engine.state) as client:
        return [info.sandbox_id async for info in client.list()]


async def test_the_quickstart_prints_what_the_readme_says(engine: EngineProcess) -> None:
    before = await sandboxes(engine)

    done = run("quickstart.py", engine)

    assert done.stdout == "42, kept\n", done.stderr
    assert await sandboxes(engine) == before


async def test_the_conversation_survives_its_pause(engine: EngineProcess) -> None:
    """Two processes, one thread id: same frame, file and background process, which counted only while awake."""
    before = await sandboxes(engine)

    done = run("conversation.py", engine)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": yes") == 3
    assert await sandboxes(engine) == before


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script answers, whatever keys there are."""
    for key in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(key, raising=False)


@pytest.mark.usefixtures("no_model")
async def test_a_graph_of_ones_own_finds_its_variables_again(engine: EngineProcess) -> None:
    before = await sandboxes(engine)

    done = run("graph.py", engine)

    assert "Sandbox: 129\n" in done.stdout, done.stdout + done.stderr
    assert await sandboxes(engine) == before


@pytest.mark.usefixtures("no_model")
async def test_an_analysis_goes_on_in_another_process_and_hands_out_its_picture(engine: EngineProcess) -> None:
    before = await sandboxes(engine)

    done = run("analysis.py", engine)

    assert "| Oslo | 11 |" in done.stdout, done.stdout + done.stderr
    ended, _, after = done.stdout.partition("[The process ends here; another one goes on.]")
    assert "sold.png" not in ended
    assert "[1 image]" in after
    assert "[sold.png is yours: " in after
    assert await sandboxes(engine) == before


def test_a_chat_without_any_models_key_says_which_to_set(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GOOGLE_API_KEY")
    for key in keys:
        monkeypatch.delenv(key, raising=False)

    done = run("chat.py", engine)

    assert done.returncode == 1
    assert all(key in done.stderr for key in keys)
