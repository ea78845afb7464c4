"""What the records of a journal make together: the state of a store, and the trials that it cannot vouch for.

Owns the rule by which damage refuses a trial and only that one. Reads no files: it is given records and damage in
their order, and hands every accepted entry on to whoever keeps payloads.

The subtle invariant: a trial is refused unless it is proven whole. Behind damage whose trials nothing names, a trial is
proven by its next record, which says its place in the log, by its outcome, behind which nothing comes, or by its
release. A refused trial keeps the entries before the damage: another replica can fill in the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rollout_ft.checkpoint.log import Entry, Head, mark
from rollout_ft.checkpoint.records import Appended, Damage, Doubted, Located, Opened, Place, Promised, Raised, Record, Released
from rollout_ft.checkpoint.state import StoreState
from rollout_ft.checkpoint.view import View

Keep = Callable[[str, Entry, Place], None]
Drop = Callable[[str], None]

OUTCOME = "outcome"
"""The kind of the entry that ends a trial."""


class Replay:
    """Puts records into `state`; `keep` is given each entry, `drop` the trials whose entries do not count any more."""

    def __init__(self, state: StoreState, keep: Keep, drop: Drop) -> None:
        self._state, self._keep, self._drop = state, keep, drop
        self._needs: dict[str, int] = {}
        self._latest: Damage | None = None

    def run(self, items: Iterable[Located | Damage]) -> None:
        for item in items:
            if isinstance(item, Damage):
                self._damaged(item)
            else:
                self._redo(item.record, item.place)

    def _redo(self, record: Record, place: Place) -> None:
        """What was accepted is not judged a second time."""
        state = self._state
        match record:
            case Appended():
                self._append(record, place)
            case Raised(trial_id, attempt, owner_epoch):
                log = state.log(trial_id)
                log.fence = max(log.fence, (attempt, owner_epoch))
            case Released():
                self._whole(record.trial_id)
                head = Head(record.attempt, record.owner_epoch, record.length, record.chain)
                state.restore_released(record.trial_id, head, record.note)
                self._drop(record.trial_id)
            case Doubted(trial_id, reason):
                self._whole(trial_id)
                state.log(trial_id).damaged = reason
            case Promised(number):
                state.promised = max(state.promised, number)
            case Opened(number, members, min_replicas):
                state.view, state.promised = View(number, members, min_replicas), max(state.promised, number)

    def _append(self, record: Appended, place: Place) -> None:
        log = self._state.log(record.trial_id)
        if log.released:
            if record.seq:
                return
            log = self._state.renew(record.trial_id)  # the id again, after its release was forgotten
        log.fence = max(log.fence, (record.attempt, record.owner_epoch))
        if record.seq > log.length:
            self._refuse(record.trial_id, record.seq + 1, self._latest)
        elif record.seq == log.length:
            entry = Entry(record.kind, record.key, record.payload)
            log.push(mark(log.head.chain, entry))
            self._keep(record.trial_id, entry, place)
            if 0 < self._needs.get(record.trial_id, 0) <= log.length:
                self._whole(record.trial_id)

    def _damaged(self, damage: Damage) -> None:
        self._latest = damage
        for trial_id in damage.trial_ids:
            self._refuse(trial_id, self._state.log(trial_id).length + 1, damage)
        if damage.attributed:
            return
        for trial_id, log in self._state.trials.items():
            if not log.released and log.last_kind not in ("", OUTCOME):
                self._refuse(trial_id, log.length + 1, damage)

    def _refuse(self, trial_id: str, needs: int, damage: Damage | None) -> None:
        log = self._state.log(trial_id)
        if log.released:
            return
        self._needs[trial_id] = max(needs, self._needs.get(trial_id, 0))
        where = f"{damage.file}: {damage.length} bytes at byte {damage.offset} are damaged" if damage else "the journal has a hole"
        log.damaged = (
            log.damaged or f"trial {trial_id} is refused: {where}, and it had a record there; its first {log.length} entries are good"
        )

    def _whole(self, trial_id: str) -> None:
        self._needs.pop(trial_id, None)
        self._state.log(trial_id).damaged = ""
