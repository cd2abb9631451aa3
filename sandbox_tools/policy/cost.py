"""What one idle period of a sandbox costs, for every time after which it might be paused: money, and waiting.

A period costs money while the sandbox runs, while it is being paused, and while it is being resumed; and it costs its
user time when the next message finds it asleep or on its way there. What of the waiting falls into the time in which
the model thinks anyway is not seen, and costs nothing, where the resume begins with the message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

VCPU_PRICE, GIB_PRICE = 0.000014, 0.0000045
"""Dollars a second for each vCPU and GiB of RAM that run: E2B's public price list. Paused is free."""

PAUSE_PER_GIB, RESUME = 4.0, 1.0
"""Seconds that a pause takes for each GiB of RAM, and that a resume takes, as E2B documents them."""

THAW = 0.05
"""Seconds until a frozen sandbox, or one whose pause was broken off, answers again."""

WAIT_PRICE = 0.01
"""Dollars for a second that a user waits and sees: $36 an hour."""

GRID: tuple[float, ...] = (0.0, *(math.exp(math.log(3600) * step / 89) for step in range(90)))
"""Seconds after which a sandbox might be paused, among which is learned: 0, then 1 to 3600 by equal factors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What one sandbox costs where it is.

    Attributes:
        running: Dollars a second while it runs.
        frozen: The same while it is frozen. None: its provider can't freeze.
        pause_seconds: How long a pause takes.
        resume_seconds: How long a resume takes.
        wait_price: Dollars for a second of waiting that a user sees. 0: only money counts.
        early_resume: Whether a resume begins with the user's message rather than with the first tool call.
        abortable: Whether a message breaks off a pause that is under way. False: it waits for the pause, and resumes.
    """

    running: float
    frozen: float | None = None
    pause_seconds: float = PAUSE_PER_GIB / 2
    resume_seconds: float = RESUME
    wait_price: float = WAIT_PRICE
    early_resume: bool = True
    abortable: bool = False

    @classmethod
    def of(
        cls,
        *,
        vcpu: float,
        gib: float,
        vcpu_price: float = VCPU_PRICE,
        gib_price: float = GIB_PRICE,
        pause_seconds: float | None = None,
        resume_seconds: float | None = None,
        wait_price: float = WAIT_PRICE,
        early_resume: bool = True,
        can_freeze: bool = False,
        abortable: bool = False,
    ) -> Terms:
        """Of a sandbox of that size; a frozen one costs its RAM only.

        Args:
            vcpu_price, gib_price: Dollars a second.
            pause_seconds, resume_seconds: As measured. None: as E2B documents them.
        """
        return cls(
            running=vcpu * vcpu_price + gib * gib_price,
            frozen=gib * gib_price if can_freeze else None,
            pause_seconds=PAUSE_PER_GIB * gib if pause_seconds is None else pause_seconds,
            resume_seconds=RESUME if resume_seconds is None else resume_seconds,
            wait_price=wait_price,
            early_resume=early_resume,
            abortable=abortable,
        )

    @property
    def key(self) -> str:
        """What is learned under other terms is not mixed with this: the terms, times to about a fifth."""
        times = map(str, map(_step, (self.pause_seconds, self.resume_seconds)))
        rates = (f"{self.running:.3g}", "-" if self.frozen is None else f"{self.frozen:.3g}", f"{self.wait_price:g}")
        return "/".join((*rates, *times, f"{self.early_resume:d}{self.abortable:d}"))

    def rounded(self) -> Terms:
        """The same for all terms of one `key`, however far measured times have moved within it."""
        pause, resume = (2 ** (_step(seconds) / 4) for seconds in (self.pause_seconds, self.resume_seconds))
        return replace(self, pause_seconds=pause, resume_seconds=resume)

    @property
    def idling(self) -> float:
        """Dollars a second until the pause: a sandbox that can be frozen is."""
        return self.running if self.frozen is None else self.frozen

    def waiting(self, seconds: float, lead: float) -> float:
        """Dollars for a wait of which `lead` seconds pass unseen."""
        return self.wait_price * max(0.0, seconds - (lead if self.early_resume else 0.0))

    def cost(self, threshold: float, gap: float, lead: float = 0.0) -> float:
        """Dollars of an idle period of `gap` seconds, had it been paused `threshold` seconds after it began.

        Args:
            gap: Seconds until the next message. inf: there was none.
            lead: Seconds from that message to the first tool call. inf: there was none.
        """
        money, wait = self.outcome(threshold, gap)
        return money + self.waiting(wait, lead)

    def outcome(self, threshold: float, gap: float) -> tuple[float, float]:
        """Dollars for the sandbox, and seconds until it is there for the message that ends the gap."""
        asleep = threshold + self.pause_seconds
        if gap <= threshold:
            return self.idling * gap, 0.0 if self.frozen is None else THAW
        if gap == math.inf:
            return self.idling * asleep, 0.0
        if gap >= asleep:
            return self.idling * asleep + self.running * self.resume_seconds, self.resume_seconds
        if self.abortable:
            return self.idling * gap, THAW
        return self.idling * asleep + self.running * self.resume_seconds, asleep - gap + self.resume_seconds

    def pause_price(self, seen: float) -> float:
        """Dollars of one pause and the resume after it (`C` in the literature on ski rental).

        Args:
            seen: Seconds of a resume that a user sees, on average.
        """
        money = self.idling * self.pause_seconds + self.running * self.resume_seconds
        return money + self.wait_price * seen

    def break_even(self, seen: float) -> float:
        """Seconds of idling that cost as much as a pause and a resume (`T*`). inf: idling costs nothing."""
        return self.pause_price(seen) / self.idling if self.idling else math.inf

    def worst_ratio(self, seen: float, seen_blocked: float) -> float:
        """How many times the best in hindsight the best fixed rule can cost at worst (`rho*`).

        Args:
            seen_blocked: Seconds that a user sees, on average, of a wait for a whole pause and the resume after it.
        """
        if self.abortable:
            return 2.0
        return 2.0 + self.wait_price * (seen_blocked - seen) / self.pause_price(seen)


def _step(seconds: float) -> int:
    return round(math.log2(max(seconds, 0.01)) * 4)


def measured(before: float | None, seconds: float) -> float:
    """A pause's or resume's usual time, the latest counting for a fifth; `before` is None for the first one."""
    return seconds if before is None else before + 0.2 * (seconds - before)
