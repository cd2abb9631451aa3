"""Computers for AI agents that wait: the public names and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandbox_tools.client import Client, Sandbox
    from sandbox_tools.errors import SandboxError
    from sandbox_tools.models import Execution, SandboxInfo
    from sandbox_tools.policy.adaptive import AdaptivePause
    from sandbox_tools.policy.pause import BreakEven, Never, PauseAfter
    from sandbox_tools.session.bindings import PostgresBindings, SqliteBindings
    from sandbox_tools.session.retention import PausedSandbox, Retention
    from sandbox_tools.session.session import Session
    from sandbox_tools.session.sessions import Sessions
    from sandbox_tools.tools.langchain import SandboxCallback, SandboxToolkit

__all__ = [
    "AdaptivePause",
    "BreakEven",
    "Client",
    "Execution",
    "Never",
    "PauseAfter",
    "PausedSandbox",
    "PostgresBindings",
    "Retention",
    "Sandbox",
    "SandboxCallback",
    "SandboxError",
    "SandboxInfo",
    "SandboxToolkit",
    "Session",
    "Sessions",
    "SqliteBindings",
]

_HOMES = {
    "client": ("Client", "Sandbox"),
    "errors": ("SandboxError",),
    "models": ("Execution", "SandboxInfo"),
    "policy.adaptive": ("AdaptivePause",),
    "policy.pause": ("BreakEven", "Never", "PauseAfter"),
    "session.bindings": ("PostgresBindings", "SqliteBindings"),
    "session.retention": ("PausedSandbox", "Retention"),
    "session.session": ("Session",),
    "session.sessions": ("Sessions",),
    "tools.langchain": ("SandboxCallback", "SandboxToolkit"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the guest and the command line need none of LangChain."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"sandbox_tools.{home}"), name)
    msg = f"`sandbox_tools` has no {name!r}."
    raise AttributeError(msg)
