"""What speaks for and against an engine, and when it is lost.

Owns the count. Pure. Requests and probes are counted apart, for an engine that is wedged may answer every probe: only a
token of a real request clears what requests said. One slow probe never loses an engine, and a paused engine is lost only
by its process' end. What the engine refuses on purpose (400, 429, 503, an abort) says nothing, and one call that stands
while others move is a lost request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Evidence(StrEnum):
    EXITED = "its process ended"
    STALLED = "no call moves"
    STALLED_ALONE = "one call does not move while others do"
    BROKEN = "a connection broke"
    FAILED = "a request failed"
    REFUSED = "a request was refused"
    PROBE_MISSED = "a probe was not answered"
    PROBE_ANSWERED = "a probe was answered"
    MOVED = "a token came"


@dataclass(frozen=True, slots=True)
class Doubt:
    """Failures in a row."""

    requests: int = 0
    probes: int = 0
    stalled: bool = False
    exited: bool = False

    def __bool__(self) -> bool:
        return self != Doubt()

    def lost(self, dead_after: int) -> bool:
        return self.exited or self.stalled or self.requests >= dead_after or self.probes >= dead_after


def weigh(doubt: Doubt, evidence: Evidence, *, paused: bool = False) -> Doubt:
    """The doubt after one more piece of evidence."""
    match evidence:
        case Evidence.EXITED:
            return replace(doubt, exited=True)
        case Evidence.MOVED:
            return Doubt(exited=doubt.exited)
        case Evidence.PROBE_ANSWERED:
            return replace(doubt, probes=0)
        case Evidence.PROBE_MISSED:
            return replace(doubt, probes=max(1, doubt.probes) if paused else doubt.probes + 1)
        case Evidence.STALLED if not paused:
            return replace(doubt, stalled=True)
        case Evidence.BROKEN | Evidence.FAILED if not paused:
            return replace(doubt, requests=doubt.requests + 1)
        case _:
            return doubt


def of_status(status: int | None) -> Evidence:
    """What the status of a refusal says; None is an abort at the engine."""
    return Evidence.FAILED if status is not None and status >= 500 and status != 503 else Evidence.REFUSED
