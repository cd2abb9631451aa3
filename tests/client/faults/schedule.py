"""Which fault each request meets: drawn from a seed, by the kind of request and how many of it came before."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request. `kind` names it; the rest is how."""

    kind: str = "none"
    delay: float = 0.0
    """Seconds before the request goes on, or before its answer does."""
    where: float = 0.5
    """Where an answer is cut, as a share of it."""
    hard: bool = False
    """Whether a connection ends with a reset, instead of a plain end."""
    status: int = 502
    """Of an answer that is made up."""
    form: str = "json"
    """Of its body: `json`, `html` or `echo`, which tells all headers of the request."""
    retry_after: str | None = None


NONE = Fault()

BEFORE = {"cut before", "refuse before", "garbage before", "not http", "limit"}
"""Kinds that keep the request from the server."""

COMMON: Mapping[str, int] = {
    "delay before": 3,
    "delay after": 3,
    "cut before": 3,  # the connection ends, and the server never sees the request
    "cut after": 4,  # the server does it, and nothing of the answer comes through
    "cut at once": 3,  # the request goes on, and the client's connection ends while the server is at work
    "cut in head": 1,
    "truncate": 3,
    "limit": 4,  # 429
    "refuse before": 4,  # 502, 503, 504 in place of the server
    "refuse after": 4,  # the same, after the server has done it
    "garbage before": 1,  # 200 and a page of HTML, as from a network's login page
    "garbage after": 2,
    "not http": 1,
    "trickle": 3,
    "close door": 1,  # new connections are refused for a while
}

OF_VERB: Mapping[str, Mapping[str, int]] = {
    "run_code": {**COMMON, "stall": 1, "garbage line": 2, "trickle": 6},
    "command": {**COMMON, "stall": 1, "garbage line": 1},
    "list": {**COMMON, "stall": 1, "overlap": 12, "shuffle": 12, "repeat": 8, "unfiltered": 6, "no end": 2},
    "info": {**COMMON, "stall": 1},
    "kill": {**COMMON, "stall": 1},
    "set_timeout": {**COMMON, "stall": 1},
}

PATIENT: Mapping[str, Mapping[str, int]] = {"create": {"stall": 1}, "connect": {"stall": 1}}
"""What takes too long for a short run."""

QUIET = {"list": 50}
"""How often nothing happens, in the same weights."""


class Schedule:
    """The faults of one run.

    Args:
        seed: The same seed gives the n-th request of a kind the same fault.
        quiet: Weight of no fault at all beside those above, which add up to some 40.
        patient: Whether what may take minutes is left without an answer too.
    """

    def __init__(self, seed: int, *, quiet: int = 90, patient: bool = False) -> None:
        self.seed = seed
        self._quiet = quiet
        self._more = PATIENT if patient else {}
        self._asked: Counter[str] = Counter()
        self.drawn: Counter[str] = Counter()

    def draw(self, verb: str) -> Fault:
        """The fault of the next request of that kind."""
        self._asked[verb] += 1
        dice = random.Random(f"{self.seed} {verb} {self._asked[verb]}")
        weights = {"none": QUIET.get(verb, self._quiet), **OF_VERB.get(verb, COMMON)}
        weights.update(self._more.get(verb, {}))
        (kind,) = dice.choices(list(weights), list(weights.values()))
        fault = Fault(
            kind=kind,
            delay=dice.choice((0.01, 0.05, 0.3)),
            where=dice.random(),
            hard=dice.random() < 0.5,
            status=dice.choice((502, 503, 504)),
            form=dice.choice(("json", "html", "echo")),
            retry_after=dice.choice((None, "0", "0.1", "0.2", "date", "3600")),
        )
        self.drawn[f"{verb}: {kind}"] += 1
        return fault

    def table(self) -> str:
        """How often each fault was drawn."""
        kinds: Counter[str] = Counter()
        for name, count in self.drawn.items():
            kinds[name.partition(": ")[2]] += count
        return "faults: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
