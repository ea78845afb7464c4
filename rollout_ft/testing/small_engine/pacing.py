"""When the tokens of a request are due.

Owns the arithmetic of rates, and nothing else: no clock, no timers. The subtle invariant: dues are counted from the
moment a pace began, not from the token before, so that lateness is made up for and a generation lasts a known time
however many others run.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_ft.testing.small_engine.protocol import Slowdown


@dataclass(slots=True)
class Pace:
    """`tokens_per_s` (0: no pace at all) counted from output token `first`, which was due at `begin`."""

    tokens_per_s: float
    begin: float
    slowdown: Slowdown | None
    first: int = 0

    def at_once(self, produced: int) -> bool:
        """What follows the first `produced` tokens is not waited for."""
        return not self.tokens_per_s and (self.slowdown is None or produced < self.slowdown.from_token)

    def chunk_end(self, produced: int, size: int) -> int:
        """Where a chunk of `size` tokens after `produced` ends: no chunk has two paces."""
        end = produced + size
        if self.slowdown is not None and produced < self.slowdown.from_token:
            return min(end, self.slowdown.from_token)
        return end

    def due(self, produced: int, end: int, now: float) -> float:
        """When the tokens `produced` to `end` have to be there."""
        if self.slowdown is not None and produced >= self.slowdown.from_token:
            self.begin = self._at(produced) if self.tokens_per_s else now
            self.first, self.tokens_per_s, self.slowdown = produced, self.slowdown.tokens_per_s, None
        return self._at(end) if self.tokens_per_s else now

    def shift(self, seconds: float) -> None:
        """A pause was no time of the request."""
        self.begin += seconds

    def _at(self, token: int) -> float:
        return self.begin + (token - self.first) / self.tokens_per_s
