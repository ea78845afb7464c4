"""What one store replica knows and decides: the view it serves, the trials' logs, the partials.

Owns the checks that belong to a replica rather than to a trial: which view may write, when nobody may, what a copy
from another replica may add. Must not know how it is reached, where bodies are kept or what a payload means.

The subtle invariant: a number that was promised (frozen) is never taken back. Writers of the view before it stay
refused until a view with at least that number is installed, so nothing can be acknowledged behind a supervisor's back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rollout_ft.checkpoint.log import Accepted, Append, Entry, Head, Mark, Refused, TrialLog, mark
from rollout_ft.checkpoint.view import View
from rollout_ft.types import Partial

DAMAGED_ELSEWHERE = "entries of it are lost: the replica that it was copied from has a damaged journal"


@dataclass(frozen=True, slots=True)
class Export:
    """A stretch of a trial's log for another replica; `prior` is the chain in front of it, `head` the source's head."""

    trial_id: str
    from_seq: int
    prior: bytes
    entries: tuple[Entry, ...]
    head: Head
    partials: tuple[Partial, ...] = ()
    note: bytes = b""
    """Of a released trial, which has no entries any more."""


def further(a: Partial, b: Partial) -> Partial:
    """Which of two partials of a turn has come further; a later generation starts from the one before it."""
    return a if (a.generations, len(a.output_ids)) > (b.generations, len(b.output_ids)) else b


class StoreState:
    """The state of a replica called `name`; `view` is the last one opened here, None for an empty learner."""

    def __init__(self, name: str, *, max_partials_per_trial: int = 64) -> None:
        self.name = name
        self.view: View | None = None
        self.promised = 0
        self.trials: dict[str, TrialLog] = {}
        self._released: dict[str, bytes] = {}
        self._partials: dict[str, dict[str, Partial]] = {}
        self._max_partials = max_partials_per_trial

    def log(self, trial_id: str) -> TrialLog:
        return self.trials.setdefault(trial_id, TrialLog())

    @property
    def opened(self) -> int:
        return self.view.number if self.view else 0

    @property
    def frozen(self) -> bool:
        return self.promised > self.opened

    def gate(self, view_number: int) -> Refused | None:
        """Whether writers of `view_number` may write here now."""
        if self.frozen:
            return Refused("frozen", self.promised)
        if self.view is None or view_number != self.view.number or self.name not in self.view.members:
            return Refused("stale_view", self.opened)
        if not self.view.writable:
            return Refused("under_replicated", self.view.min_replicas)
        return None

    def append(self, view_number: int, append: Append) -> Accepted | Refused:
        if (refused := self.gate(view_number)) is not None:
            return refused
        log = self.trials.get(append.trial_id) or TrialLog()
        outcome = log.append(append)
        if isinstance(outcome, Accepted) and outcome.stored:
            self.trials[append.trial_id] = log
            self._settle_partial(append.trial_id, append.entry.key)
        return outcome

    def fence(self, view_number: int, trial_id: str, attempt: int, owner_epoch: int) -> Head | Refused:
        if (refused := self.gate(view_number)) is not None:
            return refused
        log = self.trials.get(trial_id) or TrialLog()
        if (log.released or log.damaged) and log.stale(attempt, owner_epoch) is None:
            return Refused("closed" if log.released else "damaged", log.length)
        if (refused := log.raise_fence(attempt, owner_epoch)) is not None:
            return refused
        self.trials[trial_id] = log
        return log.head

    def put_partial(self, view_number: int, trial_id: str, attempt: int, owner_epoch: int, partial: Partial) -> bool:
        """Keep the newest partial of a turn; False when its writer, or the turn, is no longer of interest."""
        log = self.trials.get(trial_id)
        if self.gate(view_number) is not None or log is None or log.fence != (attempt, owner_epoch):
            return False
        if log.released or log.has_key(partial.turn_key):
            return False
        kept = self._partials.setdefault(trial_id, {})
        kept.pop(partial.turn_key, None)
        kept[partial.turn_key] = partial
        while len(kept) > self._max_partials:
            del kept[next(iter(kept))]
        return True

    def fixes_payload(self, trial_id: str, attempt: int, owner_epoch: int, key: str) -> bool | None:
        """None when this writer may bring no payload: it is not the owner, or the trial is gone. True when the entry is
        in the log, so that its payload is what it is; False when it may still be another."""
        log = self.trials.get(trial_id)
        if log is None or log.released or log.fence != (attempt, owner_epoch):
            return None
        return log.has_key(key)

    def partials(self, trial_id: str) -> list[Partial]:
        return list(self._partials.get(trial_id, {}).values())

    def heads(self) -> dict[str, Head]:
        return {trial_id: log.head for trial_id, log in self.trials.items()}

    def freeze(self, number: int) -> Refused | None:
        # A repeated freeze of a view that has opened meanwhile would close it for good: it is refused.
        if number < self.promised or number <= self.opened:
            return Refused("stale_view", max(self.promised, self.opened))
        self.promised = number
        return None

    def install(self, view: View) -> Refused | None:
        if view == self.view:
            return Refused("frozen", self.promised) if self.frozen else None
        if view.number < self.promised or view.number <= self.opened:
            return Refused("stale_view", max(self.promised, self.opened))
        self.view, self.promised = view, view.number
        return None

    def load(self, number: int, export: Export) -> list[Entry] | Refused:
        """Take a copy from another replica, while frozen under `number`; the entries that were new here."""
        if not self.frozen or number != self.promised:
            return Refused("stale_view", self.promised)
        log = self.trials.get(export.trial_id) or TrialLog()
        new: list[Entry] = []
        if not (log.released or export.head.released):
            length = log.head.length
            if export.from_seq > length:
                return Refused("gap", length)
            if log.chain_at(export.from_seq) != export.prior:
                return Refused("conflict", length)
            added = self._verified(log, export)
            if added is None:
                return Refused("conflict", length)
            new = list(export.entries[length - export.from_seq :])
            for each in added:
                log.push(each)
                self._settle_partial(export.trial_id, each.key)
            self._merge_partials(log, export)
            if log.length >= export.head.length:
                log.damaged = (log.damaged or DAMAGED_ELSEWHERE) if export.head.damaged else ""
        log.fence = max(log.fence, (export.head.attempt, export.head.owner_epoch))
        self.trials[export.trial_id] = log
        if export.head.released and not log.released:
            log.release(max(log.length, export.head.length), export.head.chain)
            self._forget_entries(export.trial_id, export.note)
        return new

    def release(self, trial_id: str, note: bytes = b"") -> bool:
        """Drop what a finished trial holds; its head stays, and refuses, and `note` as what is known of it.

        False when there is no such trial.
        """
        log = self.trials.get(trial_id)
        if log is None or log.released:
            return log is not None
        log.release()
        self._forget_entries(trial_id, note)
        return True

    def restore_released(self, trial_id: str, head: Head, note: bytes) -> None:
        """What a journal says of a trial that was released."""
        log = self.log(trial_id)
        log.fence = max(log.fence, (head.attempt, head.owner_epoch))
        log.release(head.length, head.chain)
        self._forget_entries(trial_id, note)

    def _forget_entries(self, trial_id: str, note: bytes) -> None:
        self._partials.pop(trial_id, None)
        self._released[trial_id] = note

    def renew(self, trial_id: str) -> TrialLog:
        """Forget a release, for another life of the same id."""
        del self._released[trial_id]
        self.trials[trial_id] = TrialLog()
        return self.trials[trial_id]

    def note(self, trial_id: str) -> bytes | None:
        """What was said of a trial when it was released; None when it is not known as released."""
        return self._released.get(trial_id)

    def forget(self, keep: int, needed: Callable[[str], bool]) -> None:
        """Drop the oldest releases beyond `keep`, but for those that are `needed`.

        Not while a view changes: replicas that forget under a copy would never become equal.
        """
        spare = len(self._released) - keep
        if spare <= keep // 8:
            return
        for trial_id in [each for each in self._released if not needed(each)][:spare]:
            del self._released[trial_id]
            del self.trials[trial_id]

    def _verified(self, log: TrialLog, export: Export) -> list[Mark] | None:
        """The marks that `export` adds behind `log`; None when what both have, or the end, is not the same."""
        known, chain, added = log.marks(export.from_seq), export.prior, list[Mark]()
        for place, entry in enumerate(export.entries):
            each = mark(chain, entry)
            chain = each.chain
            if place >= len(known):
                added.append(each)
            elif known[place] != each:
                return None
        ends = export.from_seq + len(export.entries) == export.head.length
        return None if ends and chain != export.head.chain else added

    def _merge_partials(self, log: TrialLog, export: Export) -> None:
        mine = self._partials.setdefault(export.trial_id, {})
        for partial in export.partials:
            if not log.has_key(partial.turn_key) and len(mine) < self._max_partials:
                mine[partial.turn_key] = further(partial, mine.get(partial.turn_key, partial))
        if not mine:
            del self._partials[export.trial_id]

    def _settle_partial(self, trial_id: str, key: str) -> None:
        kept = self._partials.get(trial_id)
        if kept is not None and kept.pop(key, None) is not None and not kept:
            del self._partials[trial_id]
