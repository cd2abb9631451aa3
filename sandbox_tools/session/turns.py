"""The open turns and leases of one process; noting a turn needs no event loop, and is safe from any thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass

Key = tuple[str, str]
"""Owner and thread."""


@dataclass(slots=True, kw_only=True)
class Turn:
    """One open turn.

    Attributes:
        began: When its message came; seconds since the epoch.
        touched: When a lease in it last ended, or it began.
        written: Whether other processes know of it.
        used: Whether a lease has begun in it.
    """

    began: float
    touched: float
    written: bool = False
    used: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """One tool call in flight, and the sandbox it has."""

    key: Key
    handle: str


class Turns:
    """What this process has begun and not ended."""

    def __init__(self) -> None:
        self.noting = threading.Lock()
        self.leases: dict[str, Lease] = {}
        self._open: dict[Key, dict[str, Turn]] = {}

    def __bool__(self) -> bool:
        return bool(self._open or self.leases)

    def note(self, key: Key, use: str, now: float) -> None:
        """A turn has begun; again for the same one changes nothing."""
        with self.noting:
            self._open.setdefault(key, {}).setdefault(use, Turn(began=now, touched=now))

    def drop(self, key: Key, use: str) -> Turn | None:
        """It has ended. None: there is no such turn."""
        with self.noting:
            turns = self._open.get(key, {})
            dropped = turns.pop(use, None)
            if not turns:
                self._open.pop(key, None)
        return dropped

    def unwritten(self, key: Key) -> list[str]:
        """The thread's turns that other processes are to be told of; each is told to one caller only."""
        with self.noting:
            turns = self._open.get(key, {})
            found = [use for use, turn in turns.items() if not turn.written]
            for use in found:
                turns[use].written = True
        return found

    def has(self, key: Key, use: str | None = None) -> bool:
        """Whether the thread has that turn open, or any."""
        with self.noting:
            return key in self._open and (use is None or use in self._open[key])

    def threads(self) -> list[Key]:
        """The threads that have open turns."""
        with self.noting:
            return list(self._open)

    def lead(self, key: Key, now: float) -> float | None:
        """Seconds from the message to the lease that begins now. None: it is not the first, or there is no turn."""
        with self.noting:
            turns = self._open.get(key, {}).values()
            first = None if any(turn.used for turn in turns) else min((turn.began for turn in turns), default=None)
            for turn in turns:
                turn.used, turn.touched = True, now
        return None if first is None else max(0.0, now - first)

    def touch(self, key: Key, now: float) -> None:
        """A lease has ended there."""
        with self.noting:
            for turn in self._open.get(key, {}).values():
                turn.touched = now

    def forgotten(self, before: float) -> list[tuple[Key, str]]:
        """Turns in which nothing has happened since then, nor does now."""
        busy = {lease.key for lease in self.leases.values()}
        with self.noting:
            return [
                (key, use)
                for key, turns in self._open.items()
                if key not in busy
                for use, turn in turns.items()
                if turn.touched <= before
            ]
