"""How many of an engine's calls may be retries.

Owns the budget of one engine. Pure: the time is passed in. Every call that is none brings a share of a retry, time brings
a few, and a retry takes one; what is not there yet is waited for, never refused. A storm of retries is so at most a share
of the traffic that is worth something, and dies out with its cause.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Terms:
    """`share` of the calls may be retries, and `floor_per_s` always; `burst` may come at once."""

    share: float
    floor_per_s: float
    burst: float


class RetryBudget:
    def __init__(self, terms: Terms, now: float):
        self._terms, self._left, self._at = terms, terms.burst, now

    def called(self) -> None:
        """A call that is no retry."""
        self._left = min(self._terms.burst, self._left + self._terms.share)

    def retry(self, now: float) -> float:
        """Takes one, and returns how long it has to wait: its turn comes whatever others do."""
        t = self._terms
        self._left = min(t.burst, self._left + t.floor_per_s * max(0.0, now - self._at)) - 1
        self._at = max(self._at, now)
        return max(0.0, -self._left / t.floor_per_s)

    @property
    def spent(self) -> bool:
        return self._left < 0
