"""A moment of a trial: when, of which kind, and the sentence for people.

Owns what a moment has, and how an end is said, which an event and a checkpoint say alike. Does not know where moments come from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from rollout_ft.trial.groups import LOST
from rollout_ft.types import JSON

SHOWN_CHARACTERS = 300


class Kind(StrEnum):
    OPENED = "opened"
    TURN = "turn"
    REPLAYED = "replayed"
    CONTINUED = "continued"
    REGENERATED = "regenerated"
    STEP = "step"
    FAULT = "fault"
    DOUBTED = "doubted"
    """Its engine is, which may come to nothing."""
    MOVED = "moved"
    RESUMED = "resumed"
    RESTARTED = "restarted"
    DIVERGED = "diverged"
    ENDED = "ended"
    AROUND = "around"
    """What befell the run while the trial ran."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Moment:
    """`time` is what clocks on walls show; 0 where only its place among the others is known. `text` is for people."""

    time: float
    kind: Kind
    text: str
    attempt: int = 0
    turn: int = 0
    engine: str = ""
    tokens: int = 0
    """Of a turn; of a resumed session those that it goes on from."""
    seconds: float = 0.0
    bad: bool = False

    def line(self) -> JSON:
        return asdict(self)


def ended(outcome: str, reward: float | None, cause: str) -> tuple[Kind, str, bool]:
    return Kind.ENDED, f"{outcome}, reward {reward if reward is not None else 'none'}{f': {cause}' if cause else ''}", outcome in LOST
