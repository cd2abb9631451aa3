"""Decides when an idle sandbox is paused; the sweeper asks, and only the sweeper acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sandbox_tools.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What a policy may know of a sandbox with no lease held and no turn open.

    Attributes:
        idle_since: When the last lease or turn ended, in seconds since the epoch.
    """

    idle_since: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do with an idle sandbox.

    Attributes:
        pause_after: Seconds from now until the pause. 0: at once. None: do not pause.
        reason: One clause for a log line.
    """

    pause_after: float | None
    reason: str


class PausePolicy(Protocol):
    """Answers for one idle period; it is asked again when `pause_after` has passed."""

    def decide(self, activity: Activity, now: float) -> Decision:
        """Decide at `now`, in seconds since the epoch."""
        ...


class PauseAfter:
    """Pauses after a fixed time of idleness.

    Args:
        seconds: Idle seconds until the pause. 0: as soon as the turn ends.

    Raises:
        ConfigError: `seconds` is negative or not finite.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            msg = f"`seconds` is {seconds!r}. Pass 0 or more, or use `Never()`."
            raise ConfigError(msg)
        self.seconds = seconds

    def decide(self, activity: Activity, now: float) -> Decision:
        """What is left of `seconds` since the idle period began."""
        left = max(0.0, activity.idle_since + self.seconds - now)
        return Decision(pause_after=left, reason=f"idle for {self.seconds:g} s")

    def __repr__(self) -> str:
        return f"PauseAfter({self.seconds!r})"


class Never:
    """Asks for no pause; the server's own timeout still pauses a sandbox that nobody uses."""

    def decide(self, activity: Activity, now: float) -> Decision:
        """Never pause."""
        return Decision(pause_after=None, reason="the policy is `Never`")

    def __repr__(self) -> str:
        return "Never()"
