"""How soon an engine is started again, and when no more.

Owns the count of one engine. Pure: the time is passed in. One that dies is started again at once; one whose start fails is
given more and more time, for what it lacks has to come back first. It is retired for dying too often within a window: a run
of months replaces every engine many times, and none of those says anything about the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
"""Starts that fail one after another come so far apart that they alone retire no engine by the defaults: an outage ends."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """`deaths`: when it died, within the window; `failures`: starts that failed since it was up."""

    deaths: tuple[float, ...] = ()
    failures: int = 0

    @property
    def count(self) -> int:
        return len(self.deaths)

    @property
    def pause_s(self) -> float:
        """Before the next start."""
        return min(MAX_PAUSE_S, PAUSE_S * 2.0 ** min(self.failures - 1, 16)) if self.failures else 0.0

    def died(self, now: float, window_s: float) -> Restarts:
        return replace(self, deaths=(*(at for at in self.deaths if now - at < window_s), now))

    def failed(self) -> Restarts:
        return replace(self, failures=self.failures + 1)

    def up(self) -> Restarts:
        return replace(self, failures=0)
