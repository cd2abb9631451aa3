"""Computers for AI agents that wait: the public names and nothing else."""

from __future__ import annotations

import logging
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
    from sandbox_tools.tools.artifacts import Artifacts
    from sandbox_tools.tools.callback import SandboxCallback
    from sandbox_tools.tools.langchain import SandboxToolkit
    from sandbox_tools.tools.middleware import SandboxMiddleware, approvals
    from sandbox_tools.tools.owners import configured, server_user

__all__ = [
    "AdaptivePause",
    "Artifacts",
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
    "SandboxMiddleware",
    "SandboxToolkit",
    "Session",
    "Sessions",
    "SqliteBindings",
    "approvals",
    "configured",
    "server_user",
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
    "tools.artifacts": ("Artifacts",),
    "tools.callback": ("SandboxCallback",),
    "tools.langchain": ("SandboxToolkit",),
    "tools.middleware": ("SandboxMiddleware", "approvals"),
    "tools.owners": ("configured", "server_user"),
}


# An application says where records go; until then nowhere, not to the last resort's stderr.
logging.getLogger("sandbox_tools").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the guest and the command line need none of LangChain."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"sandbox_tools.{home}"), name)
    msg = f"`sandbox_tools` has no {name!r}."
    raise AttributeError(msg)
