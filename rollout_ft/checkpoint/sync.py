"""Bringing replicas to the same logs: the copying inside a change of view.

Owns what has to be copied to whom and the patience with a replica that does not answer. Decides nothing about
membership beyond reporting who failed; `view` does that. Bodies pass through here unread.

The subtle invariant: among survivors the *union* is kept: what one of them has may have been acknowledged in a view
that the others also accepted, and costs nothing to keep if it was not. A learner has no say: it only receives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rollout_ft.checkpoint.log import GENESIS, Head
from rollout_ft.checkpoint.ports import StorePort
from rollout_ft.checkpoint.state import Export
from rollout_ft.checkpoint.view import Standing
from rollout_ft.errors import Fenced, StoreUnavailable

T = TypeVar("T")
TRIES = 3
MAX_ROUNDS = 16
SMALL_DELTA = 32
TRIALS_A_CALL = 256

_log = logging.getLogger(__name__)
_NOTHING = Head(0, 0, 0, GENESIS)


class Unreachable(StoreUnavailable):
    """The replica `name` failed every try of a call."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"store {self.name} does not answer: {self.why}"


class Control:
    """The supervisor's calls: each bounded in time and repeated a few times, since a lost reply is not a death."""

    def __init__(self, ports: Mapping[str, StorePort], call_timeout_s: float) -> None:
        self._ports, self._timeout_s = ports, call_timeout_s

    async def ask(self, name: str, call: Callable[[StorePort], Awaitable[T]]) -> T:
        why = "it is not among the stores given"
        for _ in range(TRIES if name in self._ports else 0):
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await call(self._ports[name])
            except TimeoutError:
                why = f"no answer within {self._timeout_s} s"
            except StoreUnavailable as error:
                why = str(error)
        raise Unreachable(name, why)

    async def each(self, names: Iterable[str], call: Callable[[StorePort], Awaitable[T]]) -> dict[str, T]:
        """The answers of those that answer."""
        asked = list(names)
        answers = await asyncio.gather(*(self.ask(name, call) for name in asked), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Unreachable):
                raise answer
        pairs = zip(asked, answers, strict=True)
        return {name: answer for name, answer in pairs if not isinstance(answer, BaseException)}

    async def standings(self) -> dict[str, Standing]:
        return await self.each(self._ports, lambda port: port.standing())


@dataclass(frozen=True, slots=True)
class Copy:
    """`target` lacks of `trial_id` what `source` has from `from_seq` on; `goal` is the head it must then have."""

    trial_id: str
    source: str
    target: str
    from_seq: int
    goal: Head


def goal_of(heads: Iterable[Head]) -> Head:
    """Where all replicas of a trial must end: the longest log, under the highest fence, released if any is.

    One whole log vouches for all: it has everything that was acknowledged.
    """
    known = list(heads)
    longest = max(known, key=lambda head: head.length)
    attempt, owner_epoch = max((head.attempt, head.owner_epoch) for head in known)
    released, damaged = any(head.released for head in known), all(head.damaged for head in known)
    return Head(attempt, owner_epoch, longest.length, longest.chain, released, damaged)


def same(a: Head, b: Head) -> bool:
    """Whether two replicas agree; what a released trial once held no longer matters."""
    if a.released and b.released:
        return (a.attempt, a.owner_epoch) == (b.attempt, b.owner_epoch)
    return a == b


def plan_copies(heads: Mapping[str, Mapping[str, Head]], voters: Sequence[str]) -> list[Copy]:
    """What to copy so that every replica in `heads` has the union of what `voters` have."""
    copies: list[Copy] = []
    for trial_id in dict.fromkeys(trial_id for name in voters for trial_id in heads[name]):
        holders = {name: heads[name][trial_id] for name in voters if trial_id in heads[name]}
        goal = goal_of(holders.values())
        source = max(holders, key=lambda name: (holders[name].released == goal.released, holders[name].length))
        for target, theirs in heads.items():
            have = theirs.get(trial_id, _NOTHING)
            if trial_id not in theirs or not same(have, goal):
                from_seq = 0 if goal.released else min(have.length, goal.length)
                copies.append(Copy(trial_id, source, target, from_seq, goal))
    return copies


async def run_copies(control: Control, copies: Iterable[Copy], number: int) -> None:
    """Copy many trials a call; the target verifies the chain of each stretch."""
    pairs: dict[tuple[str, str], list[Copy]] = {}
    for copy in copies:
        pairs.setdefault((copy.source, copy.target), []).append(copy)
    for (source, target), some in pairs.items():
        owed = {copy.trial_id: copy for copy in some}
        while owed:
            wanted = [(copy.trial_id, copy.from_seq) for copy in owed.values()][:TRIALS_A_CALL]
            exports = await control.ask(source, lambda port, wanted=wanted: port.export(wanted))
            await _load(control, target, number, [_raised(each, owed[each.trial_id].goal) for each in exports if each])
            for (trial_id, place), export in zip(wanted, exports, strict=False):
                copy = owed.pop(trial_id)
                reached = place + len(export.entries) if export else place
                if place < reached < copy.goal.length:
                    owed[trial_id] = replace(copy, from_seq=reached)


async def _load(control: Control, target: str, number: int, exports: list[Export]) -> None:
    refused = await control.ask(target, lambda port: port.load(number, exports)) if exports else None
    if refused is None:
        return
    if refused.reason == "stale_view":
        raise Fenced("stale_view", current=refused.current)
    # Two logs of one trial differ, which the append rule excludes. The source has all that was acknowledged, so the
    # target can be left out, and a fresh replica can take its place.
    _log.error("view.replica_differs store=%s reason=%s length=%d", target, refused.reason, refused.current)
    raise Unreachable(target, f"its log of a trial is not that of the others ({refused.reason})")


def _raised(export: Export, goal: Head) -> Export:
    """`export` under the highest fence that any replica knows, which need not be the source's; whole if any log is."""
    head = export.head
    attempt, owner_epoch = max((head.attempt, head.owner_epoch), (goal.attempt, goal.owner_epoch))
    return replace(export, head=replace(head, attempt=attempt, owner_epoch=owner_epoch, damaged=goal.damaged))


async def catch_up(control: Control, members: Sequence[str], learner: str, number: int) -> bool:
    """Copy the bulk to a learner, round after round, while members accept commits; False when the learner failed."""
    try:
        if not await _stop(control, [learner], number):
            return False
        left = None
        for _ in range(MAX_ROUNDS if members else 0):
            heads = {name: await control.ask(name, lambda port: port.heads()) for name in (members[0], learner)}
            copies = plan_copies(heads, members[:1])
            if len(copies) <= SMALL_DELTA or (left is not None and len(copies) > 0.8 * left):
                break
            left = len(copies)
            await run_copies(control, copies, number)
    except Unreachable as error:
        # When it is the source that fails, the freeze finds out, and the learner gets everything in the pause.
        _log.warning("view.catch_up_stopped learner=%s: %s", learner, error)
        return error.name != learner
    return True


async def freeze(control: Control, members: Sequence[str], number: int) -> tuple[str, ...]:
    """Stop the last view; those of its members that confirmed."""
    frozen = await _stop(control, members, number)
    if not frozen:
        raise StoreUnavailable(f"none of {', '.join(members) or '(no survivors)'} could be frozen for view {number}")
    return frozen


async def _stop(control: Control, names: Sequence[str], number: int) -> tuple[str, ...]:
    answers = await control.each(names, lambda port: port.freeze(number))
    for refused in answers.values():
        if refused is not None:
            raise Fenced("stale_view", current=refused.current)
    return tuple(name for name in names if name in answers)


async def synchronise(control: Control, members: tuple[str, ...], learner: str | None, number: int) -> tuple[tuple[str, ...], str | None]:
    """Give all the union of what the frozen members have, and verify it; those that kept up."""
    for _ in range(MAX_ROUNDS):
        everyone = members + ((learner,) if learner is not None else ())
        try:
            heads = {name: await control.ask(name, lambda port: port.heads()) for name in everyone}
            copies = plan_copies(heads, members)
            # A member may have forgotten a release that a learner copied while it was still remembered.
            known = [{trial_id for trial_id, head in heads[name].items() if not head.released} for name in everyone]
            if not copies and all(each == known[0] for each in known):
                return members, learner
            if not copies and learner is not None:
                raise Unreachable(learner, "it holds trials that no member has")
            await run_copies(control, copies, number)
        except Unreachable as error:
            _log.warning("view.replica_left_out: %s", error)
            members = tuple(name for name in members if name != error.name)
            learner = None if learner == error.name else learner
            if not members:
                raise StoreUnavailable(f"the last replica of the view failed while it was read: {error.why}") from error
    raise StoreUnavailable(f"the replicas of view {number} did not become equal in {MAX_ROUNDS} rounds")
