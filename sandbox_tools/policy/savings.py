"""What sandboxes have cost, and what they would have cost awake all the time or under a timer of five minutes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["running", "frozen", "paused", "killed", "lost"]

TIMER = 300.0
"""Idle seconds after which the services' own SDKs let a sandbox end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one sandbox does from now on.

    A use of a sandbox that runs already is one too where it follows more than `TIMER` idle seconds: without it the
    timer is taken to have run through them.

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
        rate, running_rate: Dollars a second for what it does, and for running.
        idle_since: When the idle period began in which it was frozen or paused, in seconds since the epoch.
        waited: Seconds that its user waited for it and saw.
        spent: Dollars, by the provider's prices.
        always_on: Dollars it would have cost had it never been frozen or paused.
        timer: Dollars it would have cost had it been paused after five idle minutes each time, for no more than that:
            the timer's pauses and resumes themselves count as free.
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

    @property
    def asleep(self) -> bool:
        """Whether nobody can be using it."""
        return self.state in ("frozen", "paused")

    def after(self, change: Change) -> Account:
        """With what it did until that change."""
        # When this change ends a time of running, it tells which part of that was idle.
        known = self.asleep or change.idle_since >= self.since
        idle_since = self.idle_since if self.asleep else min(change.idle_since, change.at)
        now = self._with(change.at, idle_since if known else math.inf)
        return replace(
            now,
            state=change.state,
            rate={"running": change.running, "frozen": change.frozen}.get(change.state, 0.0),
            running_rate=change.running,
            idle_since=idle_since,
            pauses=now.pauses + (change.state == "paused" != self.state),
            resumes=now.resumes + (change.state == "running" and self.state == "paused"),
            waited=now.waited + change.waited,
        )

    def until(self, at: float) -> Account:
        """With what it has gone on doing until then, in seconds since the epoch; one that runs is taken to be used."""
        return self._with(at, self.idle_since if self.asleep else math.inf)

    def _with(self, at: float, idle_since: float) -> Account:
        if self.state not in ("running", "frozen", "paused"):
            return replace(self, since=max(at, self.since))

        seconds = max(0.0, at - self.since)
        timed = min(seconds, max(0.0, idle_since + TIMER - self.since))
        return replace(
            self,
            since=self.since + seconds,
            running=self.running + (seconds if self.state == "running" else 0.0),
            frozen=self.frozen + (seconds if self.state == "frozen" else 0.0),
            paused=self.paused + (seconds if self.state == "paused" else 0.0),
            spent=self.spent + seconds * self.rate,
            always_on=self.always_on + seconds * self.running_rate,
            timer=self.timer + timed * self.running_rate,
        )

    def __add__(self, other: Account) -> Account:
        """Both together, which as a sum does nothing any more."""
        return Account(**{name: getattr(self, name) + getattr(other, name) for name in SUMMED})


SUMMED = ("running", "frozen", "paused", "pauses", "resumes", "waited", "spent", "always_on", "timer")
"""What adds up over sandboxes."""


def total(accounts: Iterable[Account]) -> Account:
    """All together."""
    return sum(accounts, start=Account())


Ledger = list[tuple[str, str, str, Account]]
"""The handle, owner, thread and account of each sandbox, as `Bindings.accounts` gives them."""

By = Literal["sandbox", "thread", "owner"]


def grouped(ledger: Ledger, by: By, at: float) -> dict[tuple[str, ...], Account]:
    """The accounts until `at`, in seconds since the epoch: by owner, by owner and thread, or also by handle."""
    groups: dict[tuple[str, ...], Account] = {}
    for handle, owner, thread, account in ledger:
        group = (owner, thread, handle)[: {"owner": 1, "thread": 2, "sandbox": 3}[by]]
        groups[group] = groups.get(group, Account()) + account.until(at)
    return groups
