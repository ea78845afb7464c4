"""All trials of a run: which are owed, and what became of their groups.

Owns the way from the end of a trial to its group. Pure, and a function of the ends in their order: whoever has the lines of
`trials.jsonl` knows what is owed and what is decided, whichever process wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout_ft.config import TrialConfig
from rollout_ft.trial.groups import Group, GroupResult, Replace
from rollout_ft.trial.siblings import Play, place_of, replacement, replacement_id


class Board:
    """`decided` are the groups that are, in the order of their decisions."""

    def __init__(self, made: Sequence[Play], config: TrialConfig):
        self._plays = {play.trial_id: play for play in made}
        self._replacements: dict[str, list[Play]] = {}
        self._max_replacements = config.max_replacements
        self._ended: set[str] = set()
        members: dict[str, list[str]] = {}
        for play in made:
            if play.group_id:
                members.setdefault(play.group_id, []).append(play.trial_id)
        self._groups = {group_id: Group(group_id, trials, config) for group_id, trials in members.items()}
        self.decided: list[GroupResult] = []

    def ended(self, trial_id: str, *, lost: bool, reward: float | None) -> Play | GroupResult | None:
        """A trial to be played in the place of this one, or the decision that was made with it. One that is not of this run
        changes nothing."""
        play = self._known(trial_id)
        if play is None:
            return None
        self._ended.add(trial_id)
        follows = self._groups[play.group_id].ended(trial_id, lost=lost, reward=reward) if play.group_id else None
        if isinstance(follows, Replace):
            again = replacement(self._plays[follows.place], follows.number, replaces=trial_id)
            self._plays[again.trial_id] = again
            self._replacements.setdefault(follows.place, []).append(again)
            return again
        if follows is not None:
            self.decided.append(follows)
        return follows

    @property
    def plays(self) -> list[Play]:
        """All of them; who takes a place follows those who had it."""
        first = [play for play in self._plays.values() if not play.replaces]
        return [each for play in first for each in (play, *self._replacements.get(play.trial_id, ()))]

    @property
    def owed(self) -> list[Play]:
        """Those without an end that something depends on: not the rest of a group that is decided."""
        return [play for play in self.plays if play.trial_id not in self._ended and not self._settled(play)]

    @property
    def held(self) -> set[str]:
        """Groups of which some trial has ended."""
        return {self._plays[trial_id].group_id for trial_id in self._ended} - {""}

    @property
    def has_groups(self) -> bool:
        return bool(self._groups)

    @property
    def undecided(self) -> int:
        return len(self._groups) - len(self.decided)

    def counts(self, trial_id: str) -> bool:
        """Whether nothing has been decided against it."""
        play = self._plays.get(trial_id)
        decided = self._groups[play.group_id].result if play is not None and play.group_id else None
        return decided is None or trial_id in decided.trials

    def _settled(self, play: Play) -> bool:
        return bool(play.group_id) and self._groups[play.group_id].result is not None

    def _known(self, trial_id: str) -> Play | None:
        """A trial that took a place says that whoever had it was lost, also where no line says so: of one that could not be
        recorded there is none."""
        place, number = place_of(trial_id)
        if trial_id not in self._plays and place in self._plays and 0 < number <= self._max_replacements:
            self.ended(replacement_id(place, number - 1) if number > 1 else place, lost=True, reward=None)
        return self._plays.get(trial_id)
