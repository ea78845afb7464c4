"""How many calls an engine takes at once, learned from what it does with them.

Owns the limit of one engine. Pure: it is told what happened, and when. A window of first tokens that came in time raises
the limit by a step, one of late ones or a refusal lowers it by a factor; while more calls are out than the limit allows it
is left alone, for what comes back then was sent under another. What is late adapts to the engine: prompts differ in
length, and so does a prefill. The subtle invariant: only calls that began with no more beside them than the floor say what
an engine takes when it is not congested. So no load, however steady, passes for normal, and an engine whose prompts have
grown is lowered to the floor, is known anew there, and finds its way up again.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP = 2.0
"""What a good window adds."""
AFTER_LATE = 0.9
AFTER_REFUSAL = 0.7
FASTER, SLOWER = 0.25, 0.2
"""How much of a first token that came sooner, or later, than it usually does goes into what is usual."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`target_s`: no first token before that is late; beyond it those are that take `tolerance` times what is usual."""

    floor: int
    ceiling: int
    start: int
    target_s: float
    tolerance: float
    window_s: float


class Limit:
    def __init__(self, rules: Rules, now: float):
        self._rules = rules
        self.calls = 0
        """The limit."""
        self._exact = 0.0
        self._usual_s: float | None = None
        self._lowered = now
        self._ends = now + rules.window_s
        self._good = self._late = self._peak = 0
        self.start(rules.start)

    @property
    def target_s(self) -> float:
        return max(self._rules.target_s, self._rules.tolerance * (self._usual_s or 0.0))

    def start(self, calls: int) -> None:
        """The engine says itself how many it can run."""
        self._set(float(calls))

    def began(self, in_flight: int) -> None:
        """A call begins, the `in_flight`th at once."""
        self._peak = max(self._peak, in_flight)

    def answered(self, began: float, beside: int, in_flight: int, now: float) -> None:
        """The first token of a call that `began` as the `beside`th at once; `in_flight` there are now."""
        waited_s = now - began
        self._learn(waited_s, beside)
        if waited_s <= self.target_s:
            self._good += 1
        elif in_flight <= self.calls:
            self._late += 1
        if now >= self._ends:
            self._close(now)

    def refused(self, began: float, now: float) -> None:
        """The engine had no room for a call, or never gave it a token."""
        if began >= self._lowered:
            self._lower(AFTER_REFUSAL, now)

    def _learn(self, waited_s: float, beside: int) -> None:
        usual, few = self._usual_s, beside <= self._rules.floor
        if usual is None:
            self._usual_s = waited_s if few else None
        elif waited_s < usual:
            self._usual_s = usual + FASTER * (waited_s - usual)
        elif few:
            self._usual_s = usual + SLOWER * (waited_s - usual)

    def _close(self, now: float) -> None:
        """A limit that was not reached is not known to be too low."""
        if self._late > self._good:
            self._lower(AFTER_LATE, now)
        elif self._good > self._late and self._peak >= self.calls:
            self._set(self._exact + STEP)
        self._window(now)

    def _lower(self, factor: float, now: float) -> None:
        self._lowered = now
        self._set(self._exact * factor)
        self._window(now)

    def _window(self, now: float) -> None:
        self._ends = now + self._rules.window_s
        self._good = self._late = self._peak = 0

    def _set(self, exact: float) -> None:
        self._exact = min(max(exact, self._rules.floor), self._rules.ceiling)
        self.calls = int(self._exact)
