"""What becomes of a turn whose engine call ended without it.

Owns the choice. Pure. What a pause, an update or an abort by the engine's owner ended costs the turn nothing; what the
engine refused costs one of its generations, and a request that it calls wrong is not sent again.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_ft.errors import EngineRefused

RETRY_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Again:
    """Call the engine again after `pause_s`, once it is open."""

    pause_s: float
    costs: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The error is the turn's answer."""

    error: EngineRefused


def after_refusal(refused: EngineRefused, *, excused: bool, failures: int, max_failures: int) -> Again | GiveUp:
    """`excused`: the engine was closed while the call ran; `failures` are those of this turn before it."""
    if refused.status == 400:
        return GiveUp(refused)
    if excused:
        return Again(0, costs=False)
    if failures + 1 >= max_failures:
        return GiveUp(EngineRefused(500, f"the turn's budget of {max_failures} generations is spent ({refused})"))
    return Again(RETRY_PAUSE_S * (failures + 1), costs=True)
