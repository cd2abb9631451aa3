"""Makes `sandbox_tools/policy/prior.py`: a few idle periods that stand for those of a published trace."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from benchmarks.pause import read

COUNT = 150

HEAD = '''"""What `AdaptivePause` begins with: {count} idle periods that stand for {all}.

Taken by `benchmarks/prior.py` from the checkpoints that entireio/cli, entireio/entire-graph (MIT) and
PackmindHub/context-evaluator (Apache-2.0) publish with their repositories: of all periods in order of length, every
{step:.0f}th.
"""

from __future__ import annotations

from math import inf

PERIODS: tuple[tuple[float, float], ...] = (
'''


def main() -> None:
    """Write it to standard output."""
    periods = sorted(read(Path(sys.argv[1])), key=lambda period: (period.gap, period.lead))
    step = len(periods) / COUNT
    chosen = [periods[int((number + 0.5) * step)] for number in range(COUNT)]
    print(HEAD.format(count=COUNT, all=len(periods), step=step), end="")
    for period in chosen:
        print(f"    ({spelt(period.gap)}, {spelt(period.lead)}),")
    print(')\n"""For each the seconds until the user came back, and from then to the first tool call; inf: never."""')


def spelt(seconds: float) -> str:
    """With three digits, which is as exact as the trace is."""
    return "inf" if seconds == math.inf else repr(float(f"{seconds:.3g}"))


if __name__ == "__main__":
    main()
