"""What clients received and what stores wrote, judged: is every acknowledged turn there once, and did the past write?

Owns the judgement. Pure, and knows nothing of how the history came about: it may not trust what it judges. An empty
list of complaints is a verdict only about what was recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rollout_ft.checkpoint.log import Entry


@dataclass(frozen=True, slots=True)
class Received:
    """A reply that reached its client whole: `turn` is its key, `body` its bytes."""

    trial_id: str
    attempt: int
    turn: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """A store took an entry (or, without one, only a fence) under this ownership."""

    trial_id: str
    attempt: int
    owner_epoch: int
    entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class History:
    """`written`: what each store took, in its order, stores that are gone included; `last`: those of the last view."""

    received: Sequence[Received]
    written: Mapping[str, Sequence[Written]]
    last: Sequence[str]

    def log(self, store: str, trial_id: str) -> list[Entry]:
        """What a store has of a trial."""
        return [w.entry for w in self.written.get(store, ()) if w.trial_id == trial_id and w.entry is not None]


Bodies = Callable[[Sequence[Entry]], Mapping[str, bytes]]
"""A trial's log to the reply of each of its turns, by key, as bytes."""


def judge(history: History, bodies: Bodies) -> list[str]:
    """Complaints, in words; none when the history keeps what is promised."""
    trials = sorted({r.trial_id for r in history.received} | {w.trial_id for each in history.written.values() for w in each})
    found = [] if history.last else ["no store is left"]
    for trial_id in trials:
        received = [r for r in history.received if r.trial_id == trial_id]
        logs = {store: history.log(store, trial_id) for store in history.last}
        found += [f"{trial_id}: {complaint}" for complaint in _differences(logs)]
        for store, log in logs.items():
            found += [f"{trial_id} in {store}: {complaint}" for complaint in _twice(log)]
            found += [f"{trial_id} in {store}: {complaint}" for complaint in _missing(received, log, bodies(log))]
    for store, written in history.written.items():
        found += [f"{store}: {complaint}" for complaint in _fenced(written)]
    return found


def _differences(logs: Mapping[str, Sequence[Entry]]) -> list[str]:
    names = list(logs)
    return [f"{names[0]} and {name} have different logs" for name in names[1:] if list(logs[name]) != list(logs[names[0]])]


def _twice(log: Sequence[Entry]) -> list[str]:
    counts = Counter((e.kind, e.key) for e in log)
    return [f"{kind} {key} is there {count} times" for (kind, key), count in counts.items() if count > 1]


def _missing(received: Sequence[Received], log: Sequence[Entry], bodies: Mapping[str, bytes]) -> list[str]:
    counts = Counter(e.key.rpartition("/")[2] for e in log if e.kind == "turn")
    found: list[str] = []
    for each in received:
        if counts[each.turn] != 1:
            found.append(f"turn {each.turn}, received in attempt {each.attempt}, is there {counts[each.turn]} times")
        elif bodies[each.turn] != each.body:
            found.append(f"turn {each.turn} is stored as {bodies[each.turn][:200]!r} and was received as {each.body[:200]!r}")
    return found


def _fenced(written: Sequence[Written]) -> list[str]:
    """Whatever a store takes under an ownership older than one it has seen was written by the past."""
    highest: dict[str, tuple[int, int]] = {}
    found: list[str] = []
    for each in written:
        writer, before = (each.attempt, each.owner_epoch), highest.get(each.trial_id, (0, 0))
        if writer < before and each.entry is not None:
            found.append(f"{each.trial_id}: {each.entry.kind} {each.entry.key} was taken from {writer} after {before}")
        highest[each.trial_id] = max(writer, before)
    return found
