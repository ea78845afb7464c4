"""The trials of a run directory, read from its journals, with no cluster.

Owns which replica is believed about what. Changes nothing on disk. A replica that was left out of the last view may be
behind and is never asked; of those in it, each has all that was acknowledged, so that the longest log that can be read is
the trial.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import orjson

from rollout_ft.checkpoint.journal import journal_names
from rollout_ft.checkpoint.offline import Trials
from rollout_ft.checkpoint.records import JournalDamaged
from rollout_ft.config import Config, journalled
from rollout_ft.session.entries import SessionEntry, decode_entry
from rollout_ft.types import JSON, Ended, Opened, Turn


@dataclass(frozen=True, slots=True)
class PastTrial:
    """What the journals have of a trial; `note` of one that was collected, `damaged` why one cannot be read."""

    trial_id: str
    entries: tuple[SessionEntry, ...] = ()
    note: JSON = field(default_factory=dict[str, object])
    released: bool = False
    damaged: str = ""

    @property
    def opened(self) -> list[Opened]:
        return [entry for entry in self.entries if isinstance(entry, Opened)]

    @property
    def ended(self) -> Ended | None:
        return next((entry for entry in self.entries if isinstance(entry, Ended)), None)

    def row(self) -> JSON:
        """`{trial_id, task_id, state, outcome, reward, attempts, turns, cause}`."""
        row: JSON = {"trial_id": self.trial_id, "task_id": "", "outcome": None, "reward": None, "attempts": 0, "turns": 0, "cause": ""}
        if self.damaged:
            return row | {"state": "damaged", "cause": self.damaged}
        if self.released:
            known = {key: self.note[key] for key in ("task_id", "outcome", "reward", "cause") if key in self.note}
            turns = self.note.get("metadata", {}).get("turns_committed", 0)
            return row | known | {"state": "collected", "attempts": self.note.get("attempt", 0), "turns": turns}
        row |= {"attempts": self.opened[-1].attempt, "task_id": self.opened[0].spec.task_id, "state": "unfinished"}
        row["turns"] = sum(isinstance(entry, Turn) for entry in self.entries)
        if self.ended is None:
            return row
        return row | {"state": "ended", "outcome": self.ended.outcome.value, "reward": self.ended.reward, "cause": self.ended.cause}


class Journals:
    """`unreadable` are journals of which nothing can be said."""

    def __init__(self, config: Config):
        self.unreadable: list[str] = []
        read: list[Trials] = []
        where = Path(config.store.journal_dir)
        for name in journal_names(where) if journalled(config) else ():
            if not name.startswith(f"{config.run}/store-"):
                continue
            try:
                read.append(Trials(where, name))
            except (JournalDamaged, OSError) as e:
                self.unreadable.append(str(e))
        last = max((trials.view.number for trials in read if trials.view), default=0)
        self._members = [trials for trials in read if trials.view and trials.view.number == last]

    def trials(self) -> list[PastTrial]:
        return [self.trial(trial_id) for trial_id in sorted({t for members in self._members for t in members.heads()})]

    def trial(self, trial_id: str) -> PastTrial:
        heads = [(members.heads()[trial_id], members) for members in self._members if trial_id in members.heads()]
        released = [members for head, members in heads if head.released]
        if released:
            note = next((note for members in released if (note := members.note(trial_id))), b"{}")
            return PastTrial(trial_id, note=orjson.loads(note), released=True)
        why = ""
        for _, members in sorted(heads, key=lambda found: (found[0].damaged, -found[0].length)):
            try:
                entries = tuple(decode_entry(entry.kind, entry.payload) for entry in members.entries(trial_id))
            except JournalDamaged as e:
                why = why or str(e)
                continue
            if entries:
                return PastTrial(trial_id, entries)
        return PastTrial(trial_id, damaged=why or "no entry of it is left")
