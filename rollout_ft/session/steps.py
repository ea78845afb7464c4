"""What a trial's environment did, as its session has it.

Owns the recorded steps in the order in which they were recorded, and how many of them lie before each turn. Pure. It records
and does not judge: which of them a later attempt may use is for whoever runs its environment (`trial.steps`).
"""

from __future__ import annotations

from rollout_ft.errors import BadRequest
from rollout_ft.types import Step


class Steps:
    def __init__(self, most: int):
        self.recorded: list[Step] = []
        self._most = most
        self._by_number: dict[tuple[int, int], Step] = {}
        self._before: dict[str, int] = {}

    def known(self, step: Step) -> Step | None:
        """What is recorded as this step of this attempt: the first that came. Raises BadRequest for one too many."""
        found = self._by_number.get((step.attempt, step.number))
        if found is None and len(self.recorded) >= self._most:
            raise BadRequest(f"the trial has {self._most} recorded steps (session.max_steps)", code="too_many_steps")
        return found

    def add(self, step: Step) -> None:
        """A step that the store has."""
        if self._by_number.setdefault((step.attempt, step.number), step) is step:
            self.recorded.append(step)

    def turn(self, key: str) -> None:
        """A turn was committed behind what is recorded so far."""
        if self.recorded:
            self._before.setdefault(key, self.recorded[-1].number)

    def before(self, key: str) -> int:
        """The number of the last step that was recorded before this turn; 0 where there was none."""
        return self._before.get(key, 0)
