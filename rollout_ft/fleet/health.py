"""Is this engine fit to serve? A state machine.

Owns the states and their transitions. Pure. The transition that matters is the one that does not exist: from dead
there is no way to healthy but through restarting, stale, and loaded weights, for an engine that answers says nothing
about its weights. An engine whose memory the trainer has comes back through stale as well. Retired is final.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    OFFLOADED = "offloaded"
    RETIRED = "retired"


class Event(StrEnum):
    STARTING = "starting"
    UP = "up"
    WEIGHTS_LOADED = "weights_loaded"
    WEIGHTS_MISSED = "weights_missed"
    OFFLOADED = "offloaded"
    ONLOADED = "onloaded"
    DOUBT = "doubt"
    PROGRESS = "progress"
    LOST = "lost"
    RETIRE = "retire"


_NEXT: dict[tuple[State, Event], State] = {
    (State.RESTARTING, Event.UP): State.STALE,
    (State.STALE, Event.WEIGHTS_LOADED): State.HEALTHY,
    (State.HEALTHY, Event.DOUBT): State.SUSPECT,
    (State.SUSPECT, Event.PROGRESS): State.HEALTHY,
    (State.DEAD, Event.STARTING): State.RESTARTING,
    **{(s, Event.WEIGHTS_MISSED): State.STALE for s in (State.HEALTHY, State.SUSPECT)},
    **{(s, Event.OFFLOADED): State.OFFLOADED for s in (State.HEALTHY, State.SUSPECT, State.STALE)},
    (State.OFFLOADED, Event.ONLOADED): State.STALE,
    **{(s, Event.LOST): State.DEAD for s in State if s not in (State.DEAD, State.RETIRED)},
    **{(s, Event.RETIRE): State.RETIRED for s in State},
}


@dataclass(frozen=True, slots=True)
class Health:
    """`incarnation` counts the starts; what an earlier one reports is not about this one."""

    state: State = State.RESTARTING
    incarnation: int = 1
    reason: str = ""

    @property
    def lives(self) -> bool:
        """Whether it can be told something, and can hold sessions until it serves again."""
        return self.serves or self.state in (State.STALE, State.OFFLOADED)

    @property
    def serves(self) -> bool:
        return self.state in (State.HEALTHY, State.SUSPECT)


def step(health: Health, event: Event, *, incarnation: int, reason: str = "") -> Health:
    """The health after an event about `incarnation`; an event that means nothing in this state changes nothing."""
    if incarnation < health.incarnation if event is Event.STARTING else incarnation != health.incarnation:
        return health
    after = _NEXT.get((health.state, event))
    if after is None:
        return health
    if event is Event.STARTING:
        return Health(after, incarnation, health.reason)
    return replace(health, state=after, reason=reason or health.reason)
