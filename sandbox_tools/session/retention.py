"""Sandboxes that sleep for long: told of before the provider deletes them, kept from it, or ended by a rule."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sandbox_tools.errors import SandboxBusyError, SandboxError
from sandbox_tools.models import SandboxInfo
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.rest import AWAKE
from sandbox_tools.session.rows import Binding
from sandbox_tools.session.stamps import HANDLE, OWNER
from sandbox_tools.session.transitions import Transitions

log = logging.getLogger("sandbox_tools.session")


@dataclass(frozen=True, kw_only=True, slots=True)
class PausedSandbox:
    """One paused sandbox of an owner, as its model may see it.

    Attributes:
        handle: What `Session.resume` takes.
        thread: The conversation it was made for.
        paused_at: When it was paused.
        age: Seconds since then.
        snapshot_bytes: Its size on disk. None: the provider does not say.
        current: Whether it is the asking thread's own.
        expires_at: When the provider deletes it, as it says itself or its documents do. None: not before it is killed,
            or unknown.
        expiring: Whether that is near, as `Retention.warn_before` says.
    """

    handle: str
    thread: str
    paused_at: datetime
    age: float
    snapshot_bytes: int | None
    current: bool
    expires_at: datetime | None = None
    expiring: bool = False


Told = Callable[[str, PausedSandbox], Awaitable[None]]
"""Gets the owner and the sandbox; `current` says nothing there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is done about sandboxes that sleep for long; every part of it only where it is asked for.

    Attributes:
        on_expiring: Called once by each registry for each sandbox that the provider will delete soon. None: nobody is.
        warn_before: How soon, in seconds.
        renew: Whether such a sandbox is woken and paused again, which makes its time begin anew where it counts from
            the pause.
        abandoned_after: Seconds asleep after which a sandbox counts as abandoned and is killed. None: never.
        owners: Whose sandboxes these rules are for. None: all that bear an owner's stamp; others are never touched.
        limit: Seconds for which the provider keeps a paused sandbox. None: as it says itself, or its documents do.
        every: Seconds between two looks.
    """

    on_expiring: Told | None = None
    warn_before: float = 3 * 86_400.0
    renew: bool = False
    abandoned_after: float | None = None
    owners: frozenset[str] | None = None
    limit: float | None = None
    every: float = 3600.0


class Keeper:
    """Looks at what is paused, and does what `Retention` says."""

    def __init__(self, transitions: Transitions, bindings: Bindings, clock: Clock, retention: Retention) -> None:
        self._transitions = transitions
        self._bindings = bindings
        self._clock = clock
        self._retention = retention
        self._told: set[tuple[str, datetime]] = set()
        self.every = retention.every

    async def paused(self, owner: str, *, current: str | None) -> list[PausedSandbox]:
        """An owner's paused sandboxes, the last paused first; those whose binding was lost are bound anew.

        Args:
            current: The handle of the asking thread's own.
        """
        found = [info async for info in self._transitions.client.list(state="paused", metadata={OWNER: owner})]
        known = {binding.sandbox_id: binding for binding in await self._bindings.of_owner(owner)}
        if any(info.sandbox_id not in known for info in found) and await self._transitions.stamps.recover(owner, {}):
            known = {binding.sandbox_id: binding for binding in await self._bindings.of_owner(owner)}
        rows = [self._row(info, known[info.sandbox_id], current) for info in found if info.sandbox_id in known]
        return sorted(rows, key=lambda row: row.paused_at, reverse=True)

    async def look(self) -> None:
        """Tell, renew and end what is due; one that fails keeps no other from its turn."""
        rules = self._retention
        if not (rules.on_expiring or rules.renew or rules.abandoned_after is not None):
            return
        async for binding, row in self._asleep():
            try:
                if rules.abandoned_after is not None and row.age >= rules.abandoned_after:
                    log.info("ending %s, which has been asleep for %.0f s", row.handle, row.age, extra=binding.ids)
                    await self._transitions.kill(row.handle, unless="used")
                elif row.expiring:
                    if rules.on_expiring and (row.handle, row.paused_at) not in self._told:
                        self._told.add((row.handle, row.paused_at))
                        await rules.on_expiring(binding.owner, row)
                    # Where it is counted from the creation nobody says whether this helps, so not again and again.
                    if rules.renew and row.age >= rules.warn_before:
                        await self._renew(row.handle)
            except SandboxBusyError:
                continue  # somebody has just begun to use it
            except SandboxError as error:
                said = "could not look after %s, which has been paused for long: %s"
                log.warning(said, row.handle, error, extra=binding.ids)

    async def _asleep(self) -> AsyncIterator[tuple[Binding, PausedSandbox]]:
        """All that bear our stamp and these bindings know under it."""
        owners = self._retention.owners
        async for info in self._transitions.client.list(state="paused"):
            owner, handle = info.metadata.get(OWNER), info.metadata.get(HANDLE)
            if owner is None or handle is None or not (owners is None or owner in owners):
                continue
            binding = await self._bindings.by_handle(owner, handle)
            if binding is None and await self._transitions.stamps.recover(owner, {HANDLE: handle}):
                binding = await self._bindings.by_handle(owner, handle)
            if binding is not None and binding.sandbox_id == info.sandbox_id:
                yield binding, self._row(info, binding, None)

    async def _renew(self, handle: str) -> None:
        async with self._transitions.exclusive(handle, unless="used") as held:
            if held is None or held.sandbox_id is None:
                return
            info = await self._transitions.client.info(held.sandbox_id)
            if info.state == "paused" and self._row(info, held, None).expiring:
                log.info("waking and pausing %s, which the provider would delete soon", handle, extra=held.ids)
                await self._bindings.write(held, state="unknown", sandbox_id=held.sandbox_id)
                await self._transitions.client.connect(held.sandbox_id, timeout=AWAKE)
                await self._transitions.put_to_sleep(held)

    def _row(self, info: SandboxInfo, binding: Binding, current: str | None) -> PausedSandbox:
        paused_at = info.end_at.astimezone(UTC)
        now = datetime.fromtimestamp(self._clock.time(), UTC)
        dialect = self._transitions.client.dialect
        limit = dialect.retention if self._retention.limit is None else self._retention.limit
        born = datetime.fromtimestamp(binding.created_at, UTC) if dialect.retention_from == "creation" else paused_at
        expires_at = None if limit is None else min(born, paused_at) + timedelta(seconds=limit)
        if self._retention.limit is None and info.expires_at is not None:
            expires_at = info.expires_at.astimezone(UTC)
        return PausedSandbox(
            handle=binding.handle,
            thread=binding.thread,
            paused_at=paused_at,
            age=max(0.0, (now - paused_at).total_seconds()),
            snapshot_bytes=info.snapshot_bytes,
            current=binding.handle == current,
            expires_at=expires_at,
            expiring=expires_at is not None and now >= expires_at - timedelta(seconds=self._retention.warn_before),
        )
