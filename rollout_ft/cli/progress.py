"""How far a run is, in the log that its job leaves: a line now and then, also while nothing ends.

Owns when there is a line, and what it says. Pure. A log is read afterwards and by programs: it has no bars.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from rollout_ft.telemetry.words import duration
from rollout_ft.trial.runner import TrialResult

EVERY_S = 30.0
"""No two lines are nearer to each other, but for the last."""
QUIET_S = 60.0
"""After so long a line comes though nothing has ended."""


class Course(Protocol):
    """Trials, as far as the process knows: those that have an end, those that need one yet, those that were begun and have none, and
    all; `restarts` of their attempts by this process. Read for a line alone, but for the first and the last: all are looked at."""

    @property
    def done(self) -> int: ...
    @property
    def owed(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def planned(self) -> int: ...


class Progress:
    def __init__(self, course: Course, now: float):
        self._course = course
        self._told = self._last_end = now
        self._outcomes = Counter[str]()

    def ended(self, result: TrialResult, now: float) -> str:
        """A line, if one is due."""
        self._outcomes[result.outcome] += 1
        self._last_end = now
        due = now - self._told >= EVERY_S or self._course.done >= self._course.planned
        return self._line(now) if due else ""

    def quiet_s(self, now: float) -> float:
        """How long to wait until a line is due though nothing has ended."""
        return max(0.0, self._told + QUIET_S - now)

    def waited(self, now: float) -> str:
        """That line, unless another came first."""
        return self._line(now) if self.quiet_s(now) == 0 else ""

    def _line(self, now: float) -> str:
        self._told, done = now, self._course.done
        said = ", ".join(f"{count:,} {outcome}" for outcome, count in self._outcomes.most_common()) or "none"
        since = f", none for {duration(round(now - self._last_end))}" if now - self._last_end >= QUIET_S else ""
        ended = f"{done:,} of {done + self._course.owed:,} trials have ended{since}, {self._course.running:,} under way"
        return f"{ended}; of this process {said}, {self._course.restarts:,} attempts restarted"
