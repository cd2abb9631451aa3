"""How the Python SDKs spell what they share: their modules, and the few words that differ."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One SDK's words; None where it has none."""

    package: str
    """Templates, files, commands and errors."""
    interpreter: str
    """The sandboxes that also run code."""
    pause_on_timeout: dict[str, Any]
    """To `create`: pause when the time is up."""
    wake_on_traffic: dict[str, Any] | None
    """To `create`: the same, and wake when somebody calls."""
    pause_without_memory: dict[str, Any] | None
    """To `pause`: keep the files only."""
    second_pause: bool | None
    """From `pause`, for a paused sandbox."""
    gone: str
    """The error of commands and files whose sandbox is no more."""
    cut_code: str
    """The error of code whose sandbox is killed while it runs."""
    cut_command: str
    """The error of a command whose sandbox is paused while it runs."""
    has: frozenset[str]
    """What not every SDK has."""
    secret: dict[str, Any] = field(default_factory=dict)
    """To `Secret.create`, beyond name and value."""

    def core(self) -> ModuleType:
        """The package."""
        return importlib.import_module(self.package)

    def error(self, name: str) -> type[Exception]:
        """An error by its name: the package's, or one of the HTTP client that it lets through."""
        module, _, name = name.rpartition(".")
        kind: type[Exception] = getattr(importlib.import_module(module or self.package), name)
        return kind

    def code(self) -> ModuleType:
        """The interpreter's package."""
        return importlib.import_module(self.interpreter)


_MODERN = frozenset(("code in copies", "private traffic", "secure", "snapshots"))
_ALL = _MODERN | {"close stdin", "file metadata", "fork", "order", "reboot"}
_E2B = Spelling(
    package="e2b",
    interpreter="e2b_code_interpreter",
    pause_on_timeout={"lifecycle": {"on_timeout": "pause"}},
    wake_on_traffic={"lifecycle": {"on_timeout": "pause", "auto_resume": True}},
    pause_without_memory={"mode": "filesystem"},
    second_pause=False,
    gone="SandboxNotRunningException",
    cut_code="TimeoutException",
    cut_command="SandboxNotRunningException",
    has=_ALL | {"create by key", "streamed input"},
)
_UCLOUD = Spelling(
    package="ucloud_sandbox",
    interpreter="ucloud_sandbox.code_interpreter",
    pause_on_timeout={"lifecycle": {"on_timeout": "pause"}},
    wake_on_traffic={"lifecycle": {"on_timeout": "pause", "auto_resume": True}},
    pause_without_memory={"keep_memory": False},
    second_pause=False,
    gone="TimeoutException",
    cut_code="TimeoutException",
    cut_command="TimeoutException",
    has=_ALL,
)
_PPIO = Spelling(
    package="ppio_sandbox.core",
    interpreter="ppio_sandbox.code_interpreter",
    pause_on_timeout={"auto_pause": True},
    wake_on_traffic={"lifecycle": {"on_timeout": "pause", "auto_resume": True}},
    pause_without_memory=None,
    second_pause=None,
    gone="TimeoutException",
    cut_code="httpx.RemoteProtocolError",
    cut_command="httpcore.RemoteProtocolError",
    has=_MODERN | {"accounts", "clone", "reset"},
    secret={"hosts": ["example.org"]},
)
# On its old domains the SDK refuses by itself what came later, a copy's own address is out of its reach, and sandboxes
# are not secured: a signature says whose a request is, and is held to nothing else.
_PPIO_LEGACY = Spelling(
    package="ppio_sandbox.core",
    interpreter="ppio_sandbox.code_interpreter",
    pause_on_timeout={"auto_pause": True},
    wake_on_traffic=None,
    pause_without_memory=None,
    second_pause=None,
    gone="TimeoutException",
    cut_code="httpx.RemoteProtocolError",
    cut_command="httpcore.RemoteProtocolError",
    has=frozenset(("accounts", "clone", "reset")),
    secret={"hosts": ["example.org"]},
)
SPELLINGS = {"e2b": _E2B, "ppio": _PPIO, "ppio-legacy": _PPIO_LEGACY, "ucloud": _UCLOUD}
