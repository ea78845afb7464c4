"""Which steps of an environment are taken, which are served from the record, and which are taken again.

Owns these rules. Pure. The recorded steps of a stateful environment are one sequence: an attempt that takes another step than
the one recorded there has left it, and what was recorded behind is void. Those of a stateless one are a set: the k-th
request for an action gets its k-th recorded result, in whatever order they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from rollout_ft.trial.environment import Ability
from rollout_ft.types import JSON

MAX_BYTES, MAX_DEPTH = 2**23, 32
"""Of an action, and of its result: what the gateway takes of both together, and less deep than that."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step that is in the checkpoint."""

    attempt: int
    number: int
    action: bytes
    result: JSON
    snapshot: str = ""


@dataclass(frozen=True, slots=True)
class CatchUp:
    """How an environment gets to where the next step begins: from this snapshot, or fresh, then these actions again."""

    snapshot: str
    actions: tuple[tuple[str, JSON], ...]
    """Each with its key."""


def canonical(said: Any) -> bytes:
    """An action or a result as it is recorded. Raises ValueError for what is no JSON object."""
    if not isinstance(said, dict):
        raise ValueError("an action and its result are objects, as a tool call's arguments are")
    try:
        return orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except TypeError as e:
        raise ValueError(f"an action and its result have to be JSON: {e}") from None


def fitting(said: Any) -> bytes:
    """The same, of what the checkpoint takes. Raises ValueError for what is larger or deeper."""
    data = canonical(said)
    if len(data) > MAX_BYTES:
        raise ValueError(f"an action and its result have at most {MAX_BYTES} bytes each, and this has {len(data)}")
    level: list[Any] = [said]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return data
    raise ValueError(f"an action and its result have at most {MAX_DEPTH} levels")


def _inside(value: Any) -> list[Any]:
    """The containers in a container."""
    inner: list[Any] = list(value.values()) if isinstance(value, dict) else value  # pyright: ignore
    return [each for each in inner if isinstance(each, (dict, list)) and each]


def recorded_of(body: JSON) -> Recorded:
    return Recorded(body["attempt"], body["number"], canonical(body["action"]), body["result"], body["snapshot"])


def sequence(recorded: Sequence[Recorded]) -> list[Recorded]:
    """What holds of a stateful environment's record, which is in the order of recording: a step voids those behind its number."""
    held: list[Recorded] = []
    for step in recorded:
        if step.number > len(held) + 1:
            continue  # the one before it never came: an attempt went on without recording it
        del held[step.number - 1 :]
        held.append(step)
    return held


@dataclass(frozen=True, slots=True)
class Due:
    """The step that an agent asks for: its number in this attempt, the key that it has in every attempt, and what is recorded of
    it, if anything is."""

    number: int
    key: str
    recorded: Recorded | None


class Steps:
    """The steps of one attempt. `recorded`: those of the attempts before it, in their order; the first `begin` of them lie behind
    this agent already."""

    def __init__(self, trial_id: str, ability: Ability, recorded: Sequence[Recorded], begin: int = 0):
        self._trial_id, self._ability = trial_id, ability
        self._held = list(recorded) if ability is Ability.STATELESS else sequence(recorded)
        self._by_action: dict[bytes, list[Recorded]] = {}
        for step in self._held:
            self._by_action.setdefault(step.action, []).append(step)
        self._asked = Counter(step.action for step in self._held[:begin])
        self._number = begin

    def due(self, action: JSON) -> Due:
        """What is asked for counts as asked for. Without a record it has to be taken, and what a stateful environment had
        recorded behind is void."""
        said = canonical(action)
        where = self._asked[said] if self._ability is Ability.STATELESS else self._number
        found = self._by_action.get(said, []) if self._ability is Ability.STATELESS else self._held
        step = found[where] if where < len(found) else None
        if self._ability is not Ability.STATELESS and step is not None and step.action != said:
            del self._held[where:]
            step = None
        self._asked[said] += 1
        self._number += 1
        return Due(self._number, self._key(said, where), step)

    def add(self, step: Recorded) -> None:
        """A step that was taken."""
        self._held.append(step)
        self._by_action.setdefault(step.action, []).append(step)

    def catch_up(self, lost: frozenset[str] = frozenset()) -> CatchUp:
        """How a new environment gets to where the step that is due begins; `lost` are snapshots that are not there any more."""
        if self._ability is Ability.STATELESS:
            return CatchUp("", ())
        past = self._held[: max(0, self._number - 1)]
        saved = -1
        if self._ability is Ability.EXPORT_RESTORE:
            saved = max((i for i, step in enumerate(past) if step.snapshot and step.snapshot not in lost), default=-1)
        again = tuple((self._key(step.action, i), orjson.loads(step.action)) for i, step in enumerate(past) if i > saved)
        return CatchUp(past[saved].snapshot if saved >= 0 else "", again)

    def _key(self, said: bytes, where: int) -> str:
        return blake2b(b"%s|%d|" % (self._trial_id.encode(), where) + said, digest_size=16).hexdigest()
