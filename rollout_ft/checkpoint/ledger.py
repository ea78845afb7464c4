"""Which segments of a journal are still needed, and what has to be carried on when one goes.

Owns the bookkeeping: which trials each segment has records of, which of them were released, the last view and promise.
Pure: it is told of every record, written or read back.

The subtle invariant: a tombstone outlives every record of its trial. As long as a segment has one (it is kept for a
trial that lives), forgetting the release would bring the trial back to life at the next start.
"""

from __future__ import annotations

from rollout_ft.checkpoint.manifest import Carried
from rollout_ft.checkpoint.records import Appended, Doubted, Opened, Promised, Raised, Record, Released


class Ledger:
    """Remembers the newest `max_released` releases, and those that are still needed."""

    def __init__(self, max_released: int) -> None:
        self._max_released = max_released
        self._view: Carried | None = None
        self._promise: Carried | None = None
        self._released: dict[str, Carried] = {}
        self._where: dict[str, set[int]] = {}
        self._living: dict[int, set[str]] = {}

    def note(self, segment: int, number: int, record: Record) -> None:
        """Segment 0 is the manifest itself."""
        match record:
            case Promised():
                self._promise = Carried(number, record)
            case Opened():
                self._view = Carried(number, record)
            case Released(trial_id):
                self._released.pop(trial_id, None)
                self._released[trial_id] = Carried(number, record)
                for each in self._where.get(trial_id, ()):
                    self._living[each].discard(trial_id)
            case Appended(trial_id) | Raised(trial_id) | Doubted(trial_id):
                if isinstance(record, Appended) and record.seq == 0:
                    self._released.pop(trial_id, None)  # the same id again, long after it was forgotten
                self._where.setdefault(trial_id, set()).add(segment)
                living = self._living.setdefault(segment, set())
                if trial_id not in self._released:
                    living.add(trial_id)

    def needed(self, segment: int) -> bool:
        return bool(self._living.get(segment))

    def holds(self, trial_id: str) -> bool:
        """Whether some segment has a record of this trial."""
        return trial_id in self._where

    def drop(self, segments: set[int]) -> None:
        for segment in segments:
            self._living.pop(segment, None)
        for trial_id in [trial_id for trial_id, where in self._where.items() if where & segments]:
            self._where[trial_id] -= segments
            if not self._where[trial_id]:
                del self._where[trial_id]
        spare = len(self._released) - self._max_released
        for trial_id in [trial_id for trial_id in self._released if trial_id not in self._where][: max(0, spare)]:
            del self._released[trial_id]

    def carried(self) -> tuple[Carried, ...]:
        """In the order of their numbers."""
        others = [each for each in (self._view, self._promise) if each is not None]
        return tuple(sorted([*self._released.values(), *others], key=lambda each: each.number))
