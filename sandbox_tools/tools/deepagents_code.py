"""The sandbox as a provider of `dcode`, deepagents' own program for the terminal: `dcode --sandbox sandbox-tools`."""

from __future__ import annotations

import contextlib
import secrets
import threading
from functools import partial
from typing import Any

from deepagents_code.integrations.sandbox_provider import (
    SandboxInstallHint,
    SandboxNotFoundError,
    SandboxProvider,
    SandboxProviderMetadata,
)

from sandbox_tools.errors import SandboxError
from sandbox_tools.session.session import Session
from sandbox_tools.session.sessions import Sessions
from sandbox_tools.tools import portal
from sandbox_tools.tools.deepagents import SandboxBackend

OWNER = "deepagents-code"


class SandboxToolsProvider(SandboxProvider):
    """Found by the entry point `sandbox-tools` of the group `deepagents_code.sandbox_providers`.

    What `dcode` calls a sandbox's id is a name of ours for its conversation. One that the user gives, with
    `--sandbox-id`, is made at its first use and kept: it is paused at the end, and wakes in the next process. Without
    one there is a new sandbox, which is deleted at the end.
    """

    def __init__(self) -> None:
        self._made: Sessions | None = None
        self._passing: set[str] = set()
        """The names of those to delete at the end."""
        self._ended: set[str] = set()
        """Of these, those that are deleted."""

    @property
    def metadata(self) -> SandboxProviderMetadata:
        """What `dcode` shows and tells its model."""
        return SandboxProviderMetadata(
            name="sandbox-tools",
            working_dir="/home/user",
            install=SandboxInstallHint(kind="package", name="sandbox-tools[local,deepagents]"),
        )

    def get_or_create(self, *, sandbox_id: str | None = None, **options: Any) -> SandboxBackend:
        """The sandbox of that name, awake, or a new one.

        Args:
            options: As of `SandboxBackend`: `timeout`, `user`.

        Raises:
            SandboxError: Ours: it can't be made or woken.
        """
        name = sandbox_id or f"code-{secrets.token_hex(4)}"
        backend = SandboxBackend(self._sessions(), owner=OWNER, thread=name, **options)
        if sandbox_id is None:
            self._passing.add(name)
        portal.run(backend.sessions, partial(_wake, backend.sessions.session(name, owner=OWNER)))
        return backend

    def delete(self, *, sandbox_id: str, **options: Any) -> None:
        """Delete the sandbox of that name, awake or paused.

        Raises:
            SandboxNotFoundError: There is none.
        """
        sessions = self._sessions()
        if sandbox_id in self._ended:
            return
        self._passing.discard(sandbox_id)
        if not portal.run(sessions, sessions.session(sandbox_id, owner=OWNER).kill):
            raise SandboxNotFoundError(sandbox_id)

    def _sessions(self) -> Sessions:
        """One registry, made on first use: `dcode` also makes providers just to read their metadata."""
        if self._made is None:
            self._made = Sessions()
            # `dcode` deletes from `atexit`, but by then Python has ended the threads that this takes. What is
            # registered here comes before them, and nothing public does.
            threading._register_atexit(partial(portal.run, self._made, self._end))  # type: ignore[attr-defined]
        return self._made

    async def _end(self) -> None:
        sessions = self._sessions()
        for name in list(self._passing):
            with contextlib.suppress(SandboxError):  # Then `dcode` says at its own attempt that it is still there.
                await sessions.session(name, owner=OWNER).kill()
                self._ended.add(name)
        await sessions.aclose()


async def _wake(session: Session) -> None:
    async with session.lease():
        pass
