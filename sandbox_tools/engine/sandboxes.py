"""Which sandboxes there are, how many may run, and how those ended that are no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sandbox_tools.engine.entry import Entry
from sandbox_tools.errors import NotFoundError, RateLimitError

# How many sandboxes that ended are remembered with the reason why.
_REMEMBERED = 1000


class Sandboxes:
    """The sandboxes of one engine, by id.

    Args:
        most: How many may run at a time; paused ones don't count. None: no limit.
    """

    def __init__(self, *, most: int | None = None) -> None:
        self.most = most
        self._entries: dict[str, Entry] = {}
        self._ended: dict[str, str] = {}
        self._beginning = 0

    def start(self, entries: Mapping[str, Entry]) -> None:
        """Begin with what an earlier engine has left."""
        self._entries = dict(entries)

    def all(self) -> list[Entry]:
        """Those that are there, whatever they are doing; may be called from any thread."""
        return [entry for entry in list(self._entries.values()) if entry.phase != "gone"]

    def running(self) -> list[Entry]:
        """Those that run and are not on their way elsewhere."""
        return [entry for entry in self.all() if entry.phase == "running"]

    def paused(self) -> list[Entry]:
        """Those that sleep."""
        return [entry for entry in self.all() if entry.phase == "paused"]

    def entry(self, sandbox_id: str) -> Entry:
        """The sandbox of that id.

        Raises:
            NotFoundError: There is none, or it is being killed; the message says how it ended, where that is known.
        """
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.phase == "gone":
            raise self.unknown(sandbox_id)
        return entry

    def check_there(self, entry: Entry) -> None:
        """Raises as `entry` does; for who has waited for the sandbox's lock."""
        if entry.phase == "gone":
            raise self.unknown(entry.record.id)

    def unknown(self, sandbox_id: str) -> NotFoundError:
        """For who asks for a sandbox that is not there."""
        msg = f"Sandbox {sandbox_id!r} doesn't exist or you don't have access to it"
        if reason := self._ended.get(sandbox_id):
            msg += f": {reason}"
        return NotFoundError(msg, sandbox_id=sandbox_id)

    def check_room(self, op: str) -> None:
        """Whether one more may run.

        Raises:
            RateLimitError: It may not.
        """
        running = sum(entry.phase != "paused" for entry in self.all()) + self._beginning
        if self.most is not None and running >= self.most:
            msg = f"{running} sandboxes run, of {self.most} that may at a time. Pause or kill one first."
            raise RateLimitError(msg, op=op)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """While a new sandbox is brought up it counts. Raises as `check_room` does."""
        self.check_room("create")
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1

    def enter(self, entry: Entry) -> None:
        """A new one is up."""
        self._entries[entry.record.id] = entry

    def remember(self, entry: Entry, reason: str) -> None:
        """From here on whoever asks is told that it is gone, and why."""
        self._ended[entry.record.id] = reason
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def forget(self, entry: Entry) -> None:
        """Nothing is left of it."""
        self._entries.pop(entry.record.id, None)
