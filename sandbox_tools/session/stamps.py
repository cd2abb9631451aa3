"""The stamp in a sandbox's metadata: whose it is, and how it is found again when a binding or an answer was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sandbox_tools.errors import OwnershipError
from sandbox_tools.models import SandboxInfo
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.rows import Binding

if TYPE_CHECKING:
    from sandbox_tools.client import Client

OWNER, THREAD, HANDLE = "sandbox_tools.owner", "sandbox_tools.thread", "sandbox_tools.handle"
"""The handle is also the key under which a lost create is found again."""

SENSITIVE = "sandbox_tools.sensitive"
"""Borne by those whose memory is never written to a disk."""


def stamp(binding: Binding) -> dict[str, str]:
    """What a new sandbox of this binding bears."""
    marks = {OWNER: binding.owner, THREAD: binding.thread, HANDLE: binding.handle}
    return marks | ({SENSITIVE: "yes"} if binding.sensitive else {})


class Stamps:
    """Reads them; nothing here wakes a sandbox."""

    def __init__(self, client: Client, bindings: Bindings, clock: Clock) -> None:
        self._client = client
        self._bindings = bindings
        self._clock = clock
        self._checked: set[str] = set()

    async def find(self, held: Binding) -> list[SandboxInfo]:
        """The sandboxes made for that binding, whether or not their create was answered; the oldest first."""
        marks = {OWNER: held.owner, HANDLE: held.handle}
        return sorted([info async for info in self._client.list(metadata=marks)], key=lambda info: info.started_at)

    async def check(self, held: Binding) -> None:
        """Look at the stamp before the first connect, which wakes a sandbox and re-arms its timer, whosever it is.

        Raises:
            OwnershipError: It is not this owner's.
        """
        assert held.sandbox_id is not None
        if held.sandbox_id in self._checked:
            return
        if (await self._client.info(held.sandbox_id)).metadata.get(OWNER) != held.owner:
            msg = f"The sandbox {held.handle!r} does not bear this owner's stamp. Kill the session to start anew."
            raise OwnershipError(msg)
        self._checked.add(held.sandbox_id)

    def forget(self, sandbox_id: str | None) -> None:
        """It is gone."""
        self._checked.discard(sandbox_id or "")

    async def recover(self, owner: str, marks: Mapping[str, str]) -> int:
        """Bind anew what bears the owner's stamp and has no binding, because bindings were lost; how many there were.

        A thread without a sandbox then has it as its own, the last made where there are several.
        """
        adopted = 0
        async for info in self._client.list(metadata={OWNER: owner, **marks}):
            handle, thread = info.metadata.get(HANDLE), info.metadata.get(THREAD)
            if handle and thread:
                adopted += await self._bindings.adopt(
                    owner,
                    thread,
                    handle,
                    sandbox_id=info.sandbox_id,
                    state="paused" if info.state == "paused" else "unknown",
                    sensitive=SENSITIVE in info.metadata,
                    now=self._clock.time(),
                )
        return adopted
