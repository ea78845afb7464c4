"""The trials of a run on a number of slots: who plays next, until nothing is owed.

Owns the slots, and that the order of the queue follows what the board knows. Pure. A trial that is popped has a slot until it
is told to have ended.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from rollout_ft.config import TrialConfig
from rollout_ft.trial.board import Board
from rollout_ft.trial.groups import GroupResult
from rollout_ft.trial.queue import Queue
from rollout_ft.trial.siblings import Play


class Schedule:
    """`earlier` are ends that another process saw, as (trial_id, lost, reward); `begun` the trials that it had begun."""

    def __init__(
        self, made: Sequence[Play], config: TrialConfig, slots: int, earlier: Iterable[tuple[str, bool, float | None]] = (),
        begun: Container[str] = (),
    ):  # fmt: skip
        self.board, self._free = Board(made, config), slots
        for trial_id, lost, reward in earlier:
            self.board.ended(trial_id, lost=lost, reward=reward)
        self._queue = Queue(self.board.held)
        for play in self.board.owed:
            self._queue.add(play, early=bool(play.replaces) or play.trial_id in begun)

    def next(self) -> Play | None:
        """Who is to be played now; None while there is no slot, or nobody waits."""
        play = self._queue.pop() if self._free else None
        self._free -= play is not None
        return play

    def ended(self, play: Play, *, lost: bool, reward: float | None) -> GroupResult | None:
        """The decision that was made with the end of a trial that had a slot."""
        self._free += 1
        follows = self.board.ended(play.trial_id, lost=lost, reward=reward)
        self._queue.ended(play)
        if isinstance(follows, Play):
            self._queue.add(follows, early=True)
            return None
        if follows is not None:
            self._queue.forget(play)
        return follows
