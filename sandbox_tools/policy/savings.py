"""What sandboxes have cost, and what they would have cost awake all the time or under a timer of five minutes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

State = Literal["running", "frozen", "paused", "killed", "lost"]

TIMER = 300.0
"""Idle seconds after which the services' own SDKs let a sandbox end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one sandbox does from now on.

    Attributes:
        at: Now, in seconds since the epoch.
        idle_since: When its last lease or turn ended, in seconds since the epoch; of one that begins to run again,
            before this use of it.
        running: Dollars a second while it runs.
        frozen: Dollars a second while it is frozen.
        waited: Seconds that its user has just waited for it and seen.
    """

    at: float
    state: State
    idle_since: float
    running: float
    frozen: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """All that one sandbox did, or several together; seconds, dollars, and how often.

    Attributes:
        state: What it does since `since`. Empty: nothing is known yet, or it is a sum.
        waited: Seconds that its user waited for it and saw.
        spent: Dollars, by the provider's prices.
        always_on: Dollars it would have cost had it never been frozen or paused.
        timer: Dollars it would have cost had it been paused after five idle minutes each time.
    """

    state: str = ""
    since: float = 0.0
    rate: float = 0.0
    running_rate: float = 0.0
    idle_since: float = 0.0
    running: float = 0.0
    frozen: float = 0.0
    paused: float = 0.0
    pauses: int = 0
    resumes: int = 0
    waited: float = 0.0
    spent: float = 0.0
    always_on: float = 0.0
    timer: float = 0.0

    def after(self, change: Change) -> Account:
        """With what it did until that change."""
        now = self.until(change.at)
        asleep = {"frozen", "paused"}
        # An idle period is priced as a whole when it is over: until then a timer is taken to run on.
        begins = change.state in asleep and self.state not in asleep
        idle_since = min(change.idle_since, change.at) if begins else self.idle_since
        return Account(
            state=change.state,
            since=change.at,
            rate={"running": change.running, "frozen": change.frozen}.get(change.state, 0.0),
            running_rate=change.running,
            idle_since=idle_since,
            running=now.running,
            frozen=now.frozen,
            paused=now.paused,
            pauses=now.pauses + (change.state == "paused" and self.state != "paused"),
            resumes=now.resumes + (change.state == "running" and self.state == "paused"),
            waited=now.waited + change.waited,
            spent=now.spent,
            always_on=now.always_on,
            timer=now.timer,
        )

    def until(self, at: float) -> Account:
        """With what it has gone on doing until then, in seconds since the epoch."""
        seconds = max(0.0, at - self.since)
        if self.state not in ("running", "frozen", "paused"):
            return self
        timed = seconds
        if self.state != "running":
            # What of this falls into the timer's five minutes, counted from the beginning of the idle period.
            end = self.idle_since + TIMER
            timed = max(0.0, min(at, end) - min(self.since, end))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values[self.state] += seconds
        values["spent"] += seconds * self.rate
        values["always_on"] += seconds * self.running_rate
        values["timer"] += timed * self.running_rate
        return Account(**values | {"since": max(at, self.since)})


SUMMED = ("running", "frozen", "paused", "pauses", "resumes", "waited", "spent", "always_on", "timer")


def total(accounts: Iterable[Account]) -> Account:
    """All together."""
    sums: dict[str, float] = dict.fromkeys(SUMMED, 0)
    for account in accounts:
        for name in SUMMED:
            sums[name] += getattr(account, name)
    return Account(**sums)  # type: ignore[arg-type]
