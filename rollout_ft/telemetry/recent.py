"""The newest events of a run, for whoever looks again and again.

Owns a bounded number of them and the cursor. Pure. Those of single trials and sessions are kept apart: there are thousands of
them, and they are not to push out why an engine was lost. A cursor names this memory: one that another supervisor gave, or that
is too old, is told that something is missing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from heapq import merge

from rollout_ft.types import JSON

OF_TRIALS = ("trial.", "session.", "turn.")
KEPT = 1000
"""Of each of the two."""
CURSOR = re.compile(r"[0-9a-f]{8}-[0-9]{1,15}")


Kept = list[tuple[int, JSON]]


class Recent:
    def __init__(self, name: str):
        """`name`: eight hexadecimal digits that no other memory has."""
        self._name, self._last = name, 0
        self._run: deque[tuple[int, JSON]] = deque(maxlen=KEPT)
        self._trials: deque[tuple[int, JSON]] = deque(maxlen=KEPT)
        self._forgotten = 0
        """The number of the newest that is not kept any more."""

    def add(self, events: Iterable[JSON]) -> None:
        for event in events:
            self._last += 1
            kept = self._trials if event["event"].startswith(OF_TRIALS) else self._run
            if len(kept) == KEPT:
                self._forgotten = max(self._forgotten, kept[0][0])
            kept.append((self._last, event))

    def since(self, cursor: str, limit: int, *, newest: bool = False) -> JSON:
        """`{events, next, missed}`: those behind the cursor, the oldest first; without one, the newest.

        `missed`: some between the cursor and these are not kept any more, or never were here; with `newest`, or are left out. Of the
        newest each of the two has half, and what the other leaves."""
        name, _, number = cursor.partition("-")
        mine = name == self._name
        behind = int(number) if mine else 0
        run, trials = ([each for each in kept if each[0] > behind] for kept in (self._run, self._trials))
        waiting = list(merge(run, trials, key=_number))
        cut = newest or not mine
        told = list(merge(*_newest(run, trials, limit), key=_number)) if cut else waiting[:limit]
        missed = self._forgotten > behind or (newest and len(told) < len(waiting)) if mine else bool(cursor)
        last = (waiting if cut else told)[-1][0] if told else behind if mine else self._last
        return {"events": [event for _, event in told], "next": f"{self._name}-{last}", "missed": missed}

    def all(self) -> list[JSON]:
        """Whatever is kept, the oldest first."""
        return [event for _, event in merge(self._run, self._trials, key=_number)]


def _newest(run: Kept, trials: Kept, limit: int) -> tuple[Kept, Kept]:
    of_run = min(len(run), max(limit - limit // 2, limit - len(trials)))
    of_trials = min(len(trials), limit - of_run)
    return run[len(run) - of_run :], trials[len(trials) - of_trials :]


def _number(kept: tuple[int, JSON]) -> int:
    return kept[0]
