"""What becomes of a group: of trials that are compared with each other, and of which some may be lost.

Owns the rules of `trial.on_lost_member`. Pure. A lost trial never counts, whatever was said of its reward, so that no failure
moves a baseline. What is decided stays: the same ends in the same order give the same decision at the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from rollout_ft.config import TrialConfig
from rollout_ft.trial.siblings import place_of, replacement_id
from rollout_ft.types import JSON, Outcome

LOST = frozenset({Outcome.INFRA_EXHAUSTED, Outcome.ENV_FAILED, Outcome.CANCELLED})
"""Outcomes that say nothing of the model: such a trial is no member of its group any more."""


class Status(StrEnum):
    WHOLE = "whole"
    SHRUNK = "shrunk"
    COMPLETED = "completed"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class GroupResult:
    """A line of `groups.jsonl`. `trials` are those that count, in the order of their places, with their `rewards`; `lost` are
    those that were lost until it was decided."""

    group_id: str
    status: str
    trials: list[str]
    lost: list[str]
    rewards: list[float | None]

    def line(self) -> JSON:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Replace:
    """Another trial is to be played in the place of one that was lost."""

    place: str
    number: int


class Group:
    """The places of `members`, and who has them. `result` is there when the group is decided."""

    def __init__(self, group_id: str, members: Sequence[str], config: TrialConfig):
        self.group_id, self._config = group_id, config
        self._holders = {member: member for member in members}
        self._waiting = dict(self._holders)
        self._rewards: dict[str, float | None] = {}
        self._lost: list[str] = []
        self.result: GroupResult | None = None

    def ended(self, trial_id: str, *, lost: bool, reward: float | None) -> Replace | GroupResult | None:
        """What follows; None: others are waited for, or it is decided already."""
        if self.result is not None or trial_id not in self._waiting:
            return None
        place = self._waiting.pop(trial_id)
        if not lost:
            self._rewards[trial_id] = reward
            return self._decide()
        self._lost.append(trial_id)
        if self._config.on_lost_member != "complete" or len(self._lost) > self._config.max_replacements:
            return self._decide()
        number = 1 if trial_id == place else place_of(trial_id)[1] + 1
        self._holders[place] = replacement_id(place, number)
        self._waiting[self._holders[place]] = place
        return Replace(place, number)

    def _decide(self) -> GroupResult | None:
        if self._dropped():
            self.result = GroupResult(self.group_id, Status.DROPPED.value, [], self._lost, [])
        elif not self._waiting:
            trials = [trial_id for trial_id in self._holders.values() if trial_id in self._rewards]
            self.result = GroupResult(
                self.group_id, self._kept().value, trials, self._lost, [self._rewards[trial_id] for trial_id in trials]
            )
        return self.result

    def _dropped(self) -> bool:
        match self._config.on_lost_member:
            case "complete":
                return len(self._lost) > self._config.max_replacements
            case "shrink":
                return bool(self._lost) and len(self._rewards) + len(self._waiting) < self._config.min_group_size
            case "drop":
                return bool(self._lost)

    def _kept(self) -> Status:
        if not self._lost:
            return Status.WHOLE
        return Status.COMPLETED if self._config.on_lost_member == "complete" else Status.SHRUNK
