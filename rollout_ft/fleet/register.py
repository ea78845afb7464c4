"""Every trial of the run that somebody may ask for by its state, its group or its outcome.

Owns a soft row per trial. Knows nothing of engines. Transitions write it as they pass; what it was not there for it takes from the
store, whose trials are the ones that there are. A row costs nothing while nobody looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from rollout_ft.checkpoint.log import Head
from rollout_ft.checkpoint.ports import Outline
from rollout_ft.fleet.listing import Row
from rollout_ft.session.entries import decode_entry
from rollout_ft.types import JSON, Ended, Opened, SessionSpec

MAX_ROWS = 100_000
"""Between two looks: at each, the store's trials are all there."""


class Register:
    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.outcomes, self.restarts = Counter[str](), 0
        """Of trials that have no row any more: what was is still counted."""

    def _forget(self, trial_id: str) -> None:
        row = self.rows.pop(trial_id, None)
        if row is not None and row.outcome:
            self.outcomes[row.outcome] += 1
            self.restarts += max(0, row.attempt - 1)

    def _row(self, trial_id: str) -> Row:
        row = self.rows.get(trial_id)
        if row is None:
            row = self.rows[trial_id] = Row(trial_id)
            if len(self.rows) > MAX_ROWS:
                self._forget(next(iter(self.rows)))
        return row

    def opened(self, spec: SessionSpec) -> None:
        """A trial begins; what is known of an earlier one of that name, which the store has forgotten, is not about it."""
        self._forget(spec.trial_id)
        row = self._row(spec.trial_id)
        row.attempt, row.known = 1, True
        _label(row, spec)

    def restarted(self, trial_id: str, attempt: int) -> None:
        row = self._row(trial_id)
        row.attempt = max(row.attempt, attempt)

    def ended(self, trial: JSON) -> None:
        """A trial's summary, which says how it ended."""
        row = self._row(trial["trial_id"])
        row.attempt = max(row.attempt, trial["attempt"])
        _summarized(row, trial)

    def released(self, trial_id: str) -> None:
        self._row(trial_id).released = True

    def take(self, heads: Mapping[str, Head], before: Iterable[str]) -> None:
        """What the store has: its trials, how far they are, which of them it has forgotten or cannot read. `before`: the rows that
        were there when it was asked; of the others it may not know yet."""
        for trial_id in before:
            if trial_id not in heads:
                self._forget(trial_id)
        for trial_id, head in heads.items():
            row = self.rows.get(trial_id)
            if row is None:
                row = self.rows[trial_id] = Row(trial_id)
            row.attempt, row.entries = max(row.attempt, head.attempt), head.length
            row.released, row.damaged = row.released or head.released, head.damaged

    def unknown(self) -> list[str]:
        """Trials of which only a head is known."""
        return [trial_id for trial_id, row in self.rows.items() if not row.known and not row.damaged and row.entries]

    def learn(self, outlines: Mapping[str, Outline]) -> None:
        for trial_id, outline in outlines.items():
            row = self.rows.get(trial_id)
            if row is None or row.known:
                continue
            row.known = True
            if outline.note:
                _summarized(row, orjson.loads(outline.note))
            first: Any = decode_entry("open", outline.first) if outline.first else None
            if isinstance(first, Opened):
                _label(row, first.spec)
            last: Any = decode_entry("outcome", outline.outcome) if outline.outcome else None
            if isinstance(last, Ended):
                row.outcome, row.reward, row.cause = last.outcome.value, last.reward, last.cause


def _label(row: Row, spec: SessionSpec) -> None:
    row.task_id, row.group_id, row.mode = spec.task_id, spec.group_id, spec.mode


def _summarized(row: Row, trial: JSON) -> None:
    row.task_id, row.group_id, row.mode = trial["task_id"], trial["group_id"], trial["mode"]
    row.outcome, row.reward, row.cause, row.known = trial["outcome"] or "", trial["reward"], trial["cause"], True
