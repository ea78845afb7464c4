"""Which trial gets the next free slot.

Owns the order: first the trial that holds up its group, of which others have ended; of those the one whose group waits for
the fewest; then what was begun before or takes the place of a lost trial; then the oldest. Pure. An event moves one group
alone: an entry of the heap that was overtaken stays where it is, and is passed over when it comes up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from rollout_ft.trial.siblings import Play

_Key = tuple[float, bool, int]


@dataclass(slots=True)
class _Group:
    """`trials` wait: a heap of (not early, number, play)."""

    trials: list[tuple[bool, int, Play]] = field(default_factory=list[tuple[bool, int, Play]])
    unfinished: int = 0
    some_ended: bool = False

    @property
    def key(self) -> _Key:
        late, number, _ = self.trials[0]
        return (self.unfinished if self.some_ended else math.inf, late, number)


class Queue:
    """Whatever it is told costs O(log n). `held`: groups of which a trial has ended already."""

    def __init__(self, held: Iterable[str] = ()):
        self._groups = {(group_id, ""): _Group(some_ended=True) for group_id in held}
        self._heap: list[tuple[_Key, _Group]] = []
        self._added = 0

    def add(self, play: Play, *, early: bool = False) -> None:
        group = self._group(play)
        heapq.heappush(group.trials, (not early, self._added, play))
        group.unfinished += 1
        self._added += 1
        self._moved(group)

    def ended(self, play: Play) -> None:
        """One that was popped."""
        group = self._group(play)
        group.unfinished, group.some_ended = group.unfinished - 1, True
        self._moved(group)

    def forget(self, play: Play) -> None:
        """Nothing of its group is wanted any more."""
        self._group(play).trials.clear()

    def pop(self) -> Play | None:
        while self._heap:
            key, group = heapq.heappop(self._heap)
            if group.trials and key == group.key:
                play = heapq.heappop(group.trials)[2]
                self._moved(group)
                return play
        return None

    def _moved(self, group: _Group) -> None:
        if group.trials:
            heapq.heappush(self._heap, (group.key, group))

    def _group(self, play: Play) -> _Group:
        """A trial without siblings is a group of its own."""
        return self._groups.setdefault((play.group_id, "" if play.group_id else play.trial_id), _Group())
