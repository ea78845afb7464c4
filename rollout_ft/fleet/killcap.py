"""How many engines are replaced on suspicion.

Owns the count. Pure: the time is passed in. Many engines that stand still at once have a cause in common, which killing them
does not cure, and what they computed would be lost with them. A process that ended is no kill and is not counted. An
engine that was allowed stays allowed: whoever asks twice is answered the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

Who = tuple[str, int]
"""An engine's id and incarnation."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`news`: whether it is the first refusal of this incarnation since something was allowed."""

    kill: bool
    news: bool = False


class KillCap:
    def __init__(self, share: float, window_s: float):
        self._share, self._window_s = share, window_s
        self._kills: deque[tuple[float, Who]] = deque()
        self._spared: set[Who] = set()

    def judge(self, who: Who, fleet: int, now: float) -> Verdict:
        """Whether `who` may be killed, of a fleet of so many."""
        while self._kills and now - self._kills[0][0] >= self._window_s:
            self._kills.popleft()
        if any(who == killed for _, killed in self._kills):
            return Verdict(True)
        if len(self._kills) < max(1, int(self._share * fleet)):
            self._kills.append((now, who))
            self._spared.clear()
            return Verdict(True)
        news = who not in self._spared
        self._spared.add(who)
        return Verdict(False, news)
