"""How far a run is, in the log that its job leaves: a line now and then.

Owns when there is a line, and what it says. Pure. A log is read afterwards and by programs: it has no bars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from rollout_ft.trial.runner import TrialResult

EVERY_S = 30.0


class Progress:
    def __init__(self, now: float):
        self._told = now
        self._outcomes = Counter[str]()
        self._restarts = 0

    def ended(self, result: TrialResult, *, done: int, planned: int, owed: Callable[[], int], now: float) -> str:
        """A line, if one is due: not more often than every `EVERY_S`, and with the last. `done`: also by earlier processes, of
        so many `planned`; `owed` is asked for a line alone, as all trials are looked at for it."""
        self._outcomes[result.outcome] += 1
        self._restarts += max(0, result.attempts - 1)
        if now - self._told < EVERY_S and done < planned:
            return ""
        self._told = now
        said = ", ".join(f"{count:,} {outcome}" for outcome, count in self._outcomes.most_common())
        return f"{done:,} of {done + owed():,} trials have ended; of this process {said}, {self._restarts:,} attempts restarted"
