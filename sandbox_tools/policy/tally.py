"""What has been learned from idle periods, as plain data that adds up: whoever saw more just adds its own."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox_tools.policy.cost import GRID

_HEAD = struct.Struct("<BxxxIdd")
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Sums over idle periods under the same terms. `Tally()` is none; `a + b` is both.

    Attributes:
        count: How many periods.
        costs: Of each threshold in `GRID`, the dollars that all would have cost with it. Empty: no periods.
        played: Dollars that they did cost.
        broken_even: Dollars that they would have cost under `BreakEven`.
    """

    count: int = 0
    costs: Sequence[float] = ()
    played: float = 0.0
    broken_even: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        if not self.count or not other.count:
            costs = self.costs or other.costs
        else:
            costs = array("d", map(float.__add__, self.costs, other.costs))
        return Tally(
            count=self.count + other.count,
            costs=costs,
            played=self.played + other.played,
            broken_even=self.broken_even + other.broken_even,
        )

    def to_bytes(self) -> bytes:
        """As `from_bytes` takes it: less than 1 KiB."""
        head = _HEAD.pack(_VERSION, self.count, self.played, self.broken_even)
        return head + struct.pack(f"<{len(self.costs)}d", *self.costs)

    @classmethod
    def from_bytes(cls, data: bytes) -> Tally:
        """What `to_bytes` gave; none, where it is of another version of this package."""
        if len(data) < _HEAD.size or data[0] != _VERSION or len(data) - _HEAD.size not in (0, 8 * len(GRID)):
            return cls()
        _, count, played, broken_even = _HEAD.unpack_from(data)
        costs = array("d", struct.unpack_from(f"<{(len(data) - _HEAD.size) // 8}d", data, _HEAD.size))
        return cls(count=count, costs=costs, played=played, broken_even=broken_even)
