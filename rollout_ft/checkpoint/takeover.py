"""Taking a trial over: fence the owners before, then adopt everything that any replica has.

Owns one takeover under one view. Must not retry or wait for another view; `mirror` does.

The subtle invariant: the fence is up on *every* replica before the first one is read. Only then do the logs stand
still; an entry read before could be followed by another that its writer was told is committed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import GENESIS, Append, Entry, Head, mark
from rollout_ft.checkpoint.replicas import Replicas, Retry, is_view_trouble, refusal
from rollout_ft.checkpoint.state import further
from rollout_ft.checkpoint.view import View
from rollout_ft.errors import CommitRefused
from rollout_ft.types import Partial


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a new owner takes over: every entry that any replica has, and the furthest partial of each turn."""

    entries: list[Entry]
    partials: list[Partial]
    head: Head


async def adopt(replicas: Replicas, view: View, trial_id: str, attempt: int, owner_epoch: int) -> Adopted:
    """Raises `Fenced` when a newer owner exists, `Retry` when `view` could not do it all."""
    replicas.require_writable(view)
    fences = await replicas.call(view.members, lambda port: port.fence(view.number, trial_id, attempt, owner_epoch))
    heads = replicas.require(fences, trial_id)
    source, longest = max(heads.items(), key=lambda item: item[1].length)
    read = await replicas.call([source], lambda port: port.read(trial_id))
    entries = replicas.require(read, trial_id)[source]
    chains = [GENESIS]
    for entry in entries:
        chains.append(mark(chains[-1], entry).chain)
    if any(head.length >= len(chains) or chains[head.length] != head.chain for head in heads.values()):
        raise CommitRefused("conflict", trial_id)
    for name, head in heads.items():
        owed = [Append(trial_id, attempt, owner_epoch, seq, entries[seq]) for seq in range(head.length, len(entries))]
        for run in wire.split([wire.encode_append(append) for append in owed]):
            await _repair(replicas, view, name, trial_id, run)
    found = await replicas.call(view.members, lambda port: port.partials(trial_id))
    return Adopted(entries, _furthest(answer for answer in found.values() if isinstance(answer, list)), longest)


async def _repair(replicas: Replicas, view: View, name: str, trial_id: str, run: list[bytes]) -> None:
    """Give a shorter replica what it lacks, as the new owner's own appends: the append rule judges them."""
    batch = wire.join(run)
    answers = await replicas.call([name], lambda port: port.append_many(view.number, batch))
    for verdict in replicas.judge(answers, len(run)):
        if verdict is not None and is_view_trouble(verdict):
            raise Retry(replicas.trouble)
        if verdict is not None:
            raise refusal(verdict, trial_id)


def _furthest(found: Iterable[list[Partial]]) -> list[Partial]:
    best: dict[str, Partial] = {}
    for partials in found:
        for partial in partials:
            best[partial.turn_key] = further(partial, best.get(partial.turn_key, partial))
    return list(best.values())
