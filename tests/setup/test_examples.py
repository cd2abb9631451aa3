"""The examples, run as a reader would run them, against a real engine of their own."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_tools import Client
from sandbox_tools.engine.install import find_runsc
from sandbox_tools.paths import state_directory, templates_directory

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A state directory with a short name (a socket's path has a limit), whose engine ends with the module."""
    state = Path(tempfile.mkdtemp(prefix="sbx-", dir="/tmp"))
    keys = ("E2B_API_KEY", "PPIO_API_KEY", "UCLOUD_SANDBOX_API_KEY", "SANDBOX_TOOLS_API_URL", "SANDBOX_TOOLS_API_KEY")
    yield {
        **{name: value for name, value in os.environ.items() if name not in keys},
        "SANDBOX_TOOLS_STATE_DIR": str(state),
        "SANDBOX_TOOLS_TEMPLATES_DIR": str(templates_directory(state_directory())),
        "SANDBOX_TOOLS_RUNSC": str(find_runsc().path),
        "COLUMNS": "160",
    }
    for engine in engines(state):
        with os.fdopen(os.pidfd_open(engine)) as ended:
            os.kill(engine, signal.SIGTERM)
            assert select.select([ended], [], [], 60)[0], "the engine did not end within 60 s"
    shutil.rmtree(state)


def engines(state: Path) -> list[int]:
    """The processes that serve a state directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue

        if "serve" in words and str(state) in words:
            found.append(int(process.name))
    return found


def run(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, EXAMPLES / name]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_the_quickstart_prints_what_the_readme_says(environment: dict[str, str]) -> None:
    done = run("quickstart.py", environment)

    assert done.stdout == "42, kept\n", done.stderr


def test_the_conversation_survives_its_pause(environment: dict[str, str]) -> None:
    """Two processes, one thread id: same frame, file and background process, which counted only while awake."""
    done = run("conversation.py", environment)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": yes") == 3


async def test_the_examples_leave_no_sandbox_behind(environment: dict[str, str]) -> None:
    done = run("quickstart.py", environment)
    assert done.returncode == 0, done.stderr

    async with Client(provider="local", state_dir=Path(environment["SANDBOX_TOOLS_STATE_DIR"])) as client:
        assert [info async for info in client.list()] == []


def test_a_chat_without_any_models_key_says_which_to_set(environment: dict[str, str]) -> None:
    keys = ("ANTHROPIC_API_KEY", "OPENAI_API_KEY", "GOOGLE_API_KEY")

    done = run("chat.py", {name: value for name, value in environment.items() if name not in keys})

    assert done.returncode == 1
    assert all(key in done.stderr for key in keys)
