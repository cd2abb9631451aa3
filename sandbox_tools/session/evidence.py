"""What is known when the policy is asked, and what is noted for it and for the savings report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sandbox_tools.policy.pause import Idle, Period, Plan, PausePolicy, Tally, Terms, smoothed
from sandbox_tools.session.bindings import Binding, Bindings, Change
from sandbox_tools.session.clock import Clock

if TYPE_CHECKING:
    from sandbox_tools.client import Client
    from sandbox_tools.client.dialects import Price

USUAL = (2, 0.5)
"""vCPU and GiB of a sandbox that nobody has looked at yet."""


class Evidence:
    """One registry's view of its sandboxes, which are all made from one template and so cost the same.

    Args:
        wait_price, price, early_resume: As for `Sessions`.
    """

    def __init__(
        self,
        client: Client,
        bindings: Bindings,
        policy: PausePolicy,
        clock: Clock,
        *,
        wait_price: float,
        price: Price | None,
        early_resume: bool,
    ) -> None:
        self._client = client
        self._bindings = bindings
        self._policy = policy
        self._clock = clock
        self._wait_price = wait_price
        self._price = price
        self._early_resume = early_resume
        self._size: tuple[float, float] | None = None
        self._pause: float | None = None
        self._resume: float | None = None
