"""How values are spread: counted into buckets, added up, and read again.

Owns the buckets and what is read from them. Pure. A histogram is counters like any other, its first label says which: of a
bucket, or of the sum in millionths, so that all are whole numbers which never go down and may be told twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

Bounds = tuple[float, ...]
"""The highest value of each bucket, rising; one more bucket has what is above them all."""
SUM, ABOVE = "sum", "+Inf"
_MILLIONTHS = 1_000_000


@cache
def names(bounds: Bounds) -> tuple[str, ...]:
    """Of the buckets, as Prometheus spells them."""
    return (*(f"{bound:g}" for bound in bounds), ABOVE)


def bucket(bounds: Bounds, value: float) -> str:
    return names(bounds)[bisect_left(bounds, value)]


def millionths(value: float) -> int:
    return round(value * _MILLIONTHS)


@dataclass(frozen=True, slots=True)
class Spread:
    """`counts` of each bucket alone."""

    bounds: Bounds
    counts: tuple[int, ...]
    sum: float

    @classmethod
    def of(cls, bounds: Bounds, counted: Mapping[str, int]) -> Spread:
        """From what was counted under each name."""
        return cls(bounds, tuple(counted.get(name, 0) for name in names(bounds)), counted.get(SUM, 0) / _MILLIONTHS)

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def rising(self) -> dict[str, int]:
        """How many were at most so much, as Prometheus has it."""
        return dict(zip(names(self.bounds), accumulate(self.counts), strict=True))

    def quantile(self, q: float) -> float:
        """Within its bucket as if values were spread evenly there; the highest bound for what is above; 0 of none."""
        rank, below, low = q * self.count, 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= rank:
                return low + (bound - low) * max(0.0, rank - below) / count
            below, low = below + count, bound
        return low if self.count else 0.0
