"""How long this engine takes, and so how long it may take.

Owns the estimate behind every deadline. Pure: times are passed in. The deadlines of the config are floors: what this
engine was seen to need of late, times a factor, is what it gets beyond them, up to a ceiling. Between two chunks lies at
most the prefill of one prompt, for an engine that computes a prompt to its end says its first token: so that what may
pass in silence grows with the longest prompt that it owes, and not with how many wait.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_S = 60.0
"""What is remembered: the worst of the last one to three of these."""
SLOW_S_PER_TOKEN = 1 / 2000
"""Of a prefill, until one was measured."""
FAST_S_PER_TOKEN = 1 / 10_000
"""A prefill that seems faster hid in another's batch, or in a cache that nobody told of."""
MEASURABLE_TOKENS = 512
"""Of fewer, the time to the first token is not that of the prefill."""


@dataclass(frozen=True, slots=True)
class Floors:
    """`engine.first_token_timeout_s`, `token_timeout_s`, `compile_timeout_s`; then the ceiling and the factor."""

    first_token_s: float
    token_s: float
    compile_s: float
    ceiling_s: float
    factor: float


class Worst:
    """The largest sample of the last one to three windows."""

    __slots__ = ("_before", "_began", "_now", "_window_s")

    def __init__(self, window_s: float):
        self._window_s, self._began = window_s, 0.0
        self._before = self._now = 0.0

    def add(self, sample: float, now: float) -> None:
        if now - self._began > self._window_s:
            self._roll(now)
        if sample > self._now:
            self._now = sample

    def value(self, now: float) -> float:
        """0 when there is none."""
        if now - self._began > self._window_s:
            self._roll(now)
        return max(self._before, self._now)

    def _roll(self, now: float) -> None:
        self._before = self._now if now - self._began <= 2 * self._window_s else 0.0
        self._now, self._began = 0.0, now


class Pace:
    """`prefilled` and `decoded`: whether it was ever seen to do so. What it does for the first time it may have to compile:
    that is given time, and not learnt from."""

    __slots__ = ("_floors", "_gaps", "_own_gaps", "_prefill", "decoded", "prefilled", "shortest_s")

    def __init__(self, floors: Floors):
        self._floors, self.shortest_s = floors, min(floors.first_token_s, floors.token_s)
        self._gaps, self._own_gaps, self._prefill = Worst(WINDOW_S), Worst(WINDOW_S), Worst(5 * WINDOW_S)
        self.prefilled = self.decoded = False

    def first_token(self, took_s: float, computed: int, now: float) -> None:
        """The first token of a call; `computed` tokens of its prompt were in no cache, and nobody else's went before."""
        if computed >= MEASURABLE_TOKENS and self.prefilled:
            self._prefill.add(took_s / computed, now)
        self.prefilled = True

    def gap(self, any_s: float, own_s: float, now: float, *, longest: int = 0) -> None:
        """A chunk of a call that had its first: so long after the last one of any call, and after its own. What the prefill
        of the `longest` prompt that was owed a first token meanwhile explains is given anew to whoever waits for such a one."""
        if self.decoded:
            self._gaps.add(any_s - self._prefill_s(longest, now), now)
            self._own_gaps.add(own_s, now)
        self.decoded = True

    def silence_s(self, now: float, *, longest: int, streams: bool) -> float:
        """How long no call at all may move. `longest`: tokens of the longest prompt that is owed a first token, 0 when
        none is; `streams`: whether a call that had one is owed its next."""
        f = self._floors
        least = max(f.token_s, f.factor * self._gaps.value(now)) if streams else f.first_token_s
        if not (self.prefilled and (self.decoded or not streams)):
            least = max(least, f.compile_s)
        return min(f.ceiling_s, least + f.factor * self._prefill_s(longest, now))

    def alone_s(self, now: float, *, tokens: int, queued: bool) -> float:
        """For how long others may move while one call of `tokens` does not: one that is queued for as long as it takes, another as
        long as a prompt of that length, for it may have lost its place in the engine's memory and be computed anew."""
        f = self._floors
        least = max(f.first_token_s, f.token_s, f.factor * self._own_gaps.value(now), 0 if self.decoded else f.compile_s)
        return f.ceiling_s if queued else min(f.ceiling_s, least + f.factor * self._prefill_s(tokens, now))

    def _prefill_s(self, tokens: int, now: float) -> float:
        measured = self._prefill.value(now)
        return tokens * (max(FAST_S_PER_TOKEN, measured) if measured else SLOW_S_PER_TOKEN)
