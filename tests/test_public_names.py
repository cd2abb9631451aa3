"""What is public is a short list, and asking for it costs nothing that is not asked for."""

from __future__ import annotations

import subprocess
import sys

import sandbox_tools


def test_every_public_name_is_there_and_the_list_is_sorted():
    assert sandbox_tools.__all__ == sorted(sandbox_tools.__all__)
    assert all(getattr(sandbox_tools, name).__name__ == name for name in sandbox_tools.__all__)


def test_importing_the_package_imports_neither_langchain_nor_the_engine():
    heavy = "('langchain', 'starlette', 'httpx')"
    code = f"import sandbox_tools, sys; print([name for name in sys.modules if name.startswith({heavy})])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_client_imports_no_framework():
    """Who only wants sandboxes waits for no agent framework and no web server."""
    frameworks = "{'langchain', 'langchain_core', 'langgraph', 'deepagents', 'mcp', 'fastapi', 'starlette', 'uvicorn'}"
    rooms = "[name for name in sys.modules if name.startswith(('sandbox_tools.engine', 'sandbox_tools.tools'))]"
    code = f"from sandbox_tools import Client, Sandbox; import sys; print({frameworks} & sys.modules.keys(), {rooms})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set() []\n"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(sandbox_tools, "NoSuchName")
