"""What keeps a sandbox awake on purpose, beyond turns and processes: a time, a port, a command that runs."""

from __future__ import annotations

import logging
import math

from sandbox_tools.errors import SandboxError, SandboxStateError
from sandbox_tools.session.bindings import Bindings
from sandbox_tools.session.clock import Clock
from sandbox_tools.session.rest import AWAKE, GONE
from sandbox_tools.session.rows import Hold
from sandbox_tools.session.transitions import Transitions

log = logging.getLogger("sandbox_tools.session")

POLL = 30.0
"""Seconds between two looks at the commands that keep a sandbox awake."""

SOON = 1.0
"""Seconds until another look at what another process is changing just now."""

AFTER = 15
"""Seconds for which the server's timer outlasts a hold, so that the policy has its say first."""


class Holds:
    """Asks after what is held, and moves the server's timer along."""

    def __init__(self, transitions: Transitions, bindings: Bindings, clock: Clock) -> None:
        self._transitions = transitions
        self._bindings = bindings
        self._clock = clock

    async def look(self, handle: str) -> float | None:
        """When to look again, in seconds since the epoch. None: nothing holds it."""
        now = self._clock.time()
        holds = await self._bindings.holds(handle, now)
        if any(hold.pid is not None for hold in holds):
            running = await self._running(handle)
            for hold in holds:
                if hold.pid is not None and hold.pid not in running:
                    await self._bindings.end_use(hold.id, now)
            holds = [hold for hold in holds if hold.pid is None or hold.pid in running]
        if not holds:
            return None
        again = min([now + POLL, *(hold.until for hold in holds)] if _commands(holds) else [_last(holds)])
        # A command is asked after again long before its time is over; if nobody lives to do so, it has some minutes.
        seconds = AWAKE if _commands(holds) else max(AWAKE, math.ceil(_last(holds) - now) + AFTER)
        # In a transition, or one that has just been planning the idle period would move the timer back.
        async with self._transitions.exclusive(handle, unless="nothing") as held:
            if held is None:
                return now + SOON
            if held.sandbox_id is None or held.state == "paused":
                return None
            if held.state == "frozen":
                await self._transitions.client.connect(held.sandbox_id, timeout=AWAKE)
            elif held.awake_until - now > seconds / 2:
                await self._transitions.leave(held, due_at=again)
                return again
            await self._transitions.arm(held, seconds, due_at=again)
        return again

    async def prolong(self, handle: str, seconds: int = AWAKE) -> None:
        """Renew the server's timer of one that is in use, if less than half of that time is left."""
        # As it stands in the row: another process may have set it since.
        now, held = self._clock.time(), await self._bindings.get(handle)
        if held is None or held.sandbox_id is None or held.state == "paused" or held.awake_until - now > seconds / 2:
            return
        try:
            seconds = await self._transitions.set_timeout(held.sandbox_id, seconds)
        except SandboxError as error:
            log.warning("could not prolong %s, which is in use: %s", handle, error, extra=held.ids)
        else:
            await self._bindings.note(held, state=held.state, awake_until=now + seconds)

    async def _running(self, handle: str) -> set[int]:
        """The process ids of the commands that run in it; none where it is asleep or gone."""
        held = await self._bindings.get(handle)
        if held is None or held.sandbox_id is None or held.state == "paused":
            return set()
        try:
            if handle not in self._transitions.awake:
                await self._transitions.stamps.check(held)
                sandbox = await self._transitions.client.connect(held.sandbox_id, timeout=AWAKE)
                self._transitions.saw(handle, sandbox)
            commands = self._transitions.awake[handle].sandbox.commands
            asked = set(commands.started)
            running = {process.pid for process in await commands.list()}
        except (SandboxStateError, *GONE):
            return set()
        commands.started -= asked - running
        return running


def _commands(holds: list[Hold]) -> bool:
    return any(hold.pid is not None for hold in holds)


def _last(holds: list[Hold]) -> float:
    return max(hold.until for hold in holds)
