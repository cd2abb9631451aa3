"""What bindings hold, as plain data."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields
from typing import Literal

Hint = Literal["new", "creating", "running", "frozen", "paused", "unknown"]
"""`creating`: a create was sent and its answer not yet written here. `unknown`: ask the server."""

Unless = Literal["nothing", "leased", "used"]
"""What refuses a transition: nothing; a live lease; or a live lease, hold or open turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """One sandbox of one owner, as last written; times are seconds since the epoch.

    Attributes:
        thread: The thread it was made for; other threads of the owner may have taken it over since.
        sandbox_id: None: none has been made yet, or a create is under way.
        awake_until: When the server's own timer ends it, as we last set it.
        idle_since: When its last lease or turn ended.
        fence: Grows with every transition.
        created_at: When the binding was made.
        due_at: When a policy wants it paused. None: it is in use, or nobody has asked a policy yet.
        sensitive: Whether its memory is never to be written to a disk.
        sentinel: What the last pause left to be looked for, as JSON. None: nothing.
    """

    handle: str
    owner: str
    thread: str
    sandbox_id: str | None
    state: Hint
    awake_until: float
    idle_since: float
    fence: int
    created_at: float
    due_at: float | None
    sensitive: bool
    sentinel: str | None

    @property
    def ids(self) -> dict[str, str | None]:
        """What a log record or a span of it bears."""
        return {
            "sandbox_id": self.sandbox_id,
            "sandbox_handle": self.handle,
            "thread_id": self.thread,
            "owner_id": self.owner,
        }


COLUMNS = ", ".join(field.name for field in fields(Binding))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """What keeps a sandbox awake beyond turns and processes.

    Attributes:
        id: What `Bindings.end_use` takes.
        pid: The command that runs in it. None: somebody asked for a time.
        until: When it ends by itself, in seconds since the epoch.
    """

    id: str
    pid: int | None
    until: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An idle period of which as much is known as ever will be looked at; times are seconds since the epoch.

    Attributes:
        threshold: After how many seconds it was to be paused. None: never.
        ended: When it was used again. None: it was not.
        lead: Seconds from then to the first lease. None: there was none.
        priced: Whether the pool knows already what it has cost.
    """

    owner: str
    began: float
    threshold: float | None
    ended: float | None
    lead: float | None
    priced: bool = False


def new_handle() -> str:
    """A word the model can repeat and nobody can guess: 50 random bits."""
    alphabet = "abcdefghijkmnpqrstuvwxyz23456789"
    return "sbx-" + "".join(secrets.choice(alphabet) for _ in range(10))
