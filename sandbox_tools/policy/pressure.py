"""Which frozen sandboxes are paused when a host's RAM runs short: those whose RAM is dearest for what waking costs.

GreedyDual-Size (Cao and Irani, "Cost-aware WWW proxy caching algorithms", 1997): each has a key, its cost for its size
above the host's level at its last use; the one of least key goes first, and the level rises to its key. So what has
not been used for long goes before what was, a large one before a small one, and none stays for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.pause import seen


def key(level: float, terms: Terms, gib: float) -> float:
    """The key of a sandbox that is used now, while the host's level is `level`; the first level is 0.

    Args:
        gib: What it holds of the RAM.
    """
    return level + terms.pause_price(seen(terms)) / gib


def victims(frozen: Mapping[str, tuple[float, float]], wanted: float, level: float) -> tuple[list[str], float]:
    """Which to pause so that at least `wanted` GiB become free, first to last, and the level after it.

    Args:
        frozen: The key and the GiB of each, by its handle. All of them go where they are not enough.
    """
    chosen = []
    for handle, (priority, gib) in sorted(frozen.items(), key=lambda item: (item[1][0], item[0])):
        if wanted <= 0:
            break
        chosen.append(handle)
        wanted -= gib
        level = max(level, priority)
    return chosen, level
