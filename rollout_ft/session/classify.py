"""What a repeated request gets: the same generation, a recorded reply, or another sample.

Owns the table of DESIGN section 5 for requests with the same parent, messages, tools and sampling. Pure. Evidence
decides, never the equality of bodies alone: an agent that could not use a reply asks with the same body again, and a
client whose connection broke does so too; only the first must get another sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a body: `asked` in this attempt, `answered` when its reply is delivered or acknowledged."""

    number: int
    in_flight: bool
    live_callers: int = 0
    asked: bool = True
    answered: bool = False
    replays: int = 0
    """How often it was given again: to who has it, or until now in vain."""


@dataclass(frozen=True, slots=True)
class Choice:
    action: Literal["generate", "attach", "replay"]
    number: int


def choose(
    samples: Sequence[Sample],
    *,
    retry: bool,
    new_idempotency_key: bool,
    on_concurrent: Literal["sample", "attach"],
    on_repeat: Literal["sibling", "replay_once"],
    max_replays: int,
    max_vain_replays: int,
) -> Choice:
    """What the next request for this body gets. `samples` are in the order of their numbers.

    A client that cannot read a reply repeats its request for ever. After `max_replays` its retries get another sample, and
    after `max_vain_replays` where the reply never seems to arrive, for it may be the reply that breaks the connection.
    """
    fresh = Choice("generate", samples[-1].number + 1 if samples else 0)
    flights = [s for s in samples if s.in_flight]
    left = [s for s in flights if s.live_callers == 0]
    if left:
        return Choice("attach", left[-1].number)
    if flights and (on_concurrent == "attach" or (retry and not new_idempotency_key)):
        return Choice("attach", flights[-1].number)
    recorded = [s for s in samples if not s.in_flight]
    for s in recorded:
        if s.asked and not s.answered and s.replays < max_vain_replays:
            return Choice("replay", s.number)
    asked = [s for s in recorded if s.asked]
    if asked and retry and not new_idempotency_key and asked[-1].replays < max_replays:
        return Choice("replay", asked[-1].number)
    for s in recorded:
        if not s.asked:
            return Choice("replay", s.number)
    if asked and not flights and on_repeat == "replay_once" and asked[-1].replays == 0:
        return Choice("replay", asked[-1].number)
    return fresh
