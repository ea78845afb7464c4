"""What becomes of a turn whose engine call ended without it.

Owns the choice, and how long it waits. Pure: the luck of the draw is passed in. What a pause, an update or an abort by the
engine's owner ended costs the turn nothing, nor does an engine that has no room: then the turn comes again, later each
time. What else the engine refused costs one of its generations, and a request that it calls wrong is not sent again.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_ft.config import RetryConfig
from rollout_ft.errors import EngineRefused

FULL = (429, 503)
"""What an engine answers that has no room, or that had no time for a request in all it may take."""
MAX_DOUBLINGS = 16


@dataclass(frozen=True, slots=True)
class Again:
    """Call the engine again after `pause_s`, once it is open. `retry`: it counts as one in the engine's traffic."""

    pause_s: float
    costs: bool
    retry: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The error is the turn's answer."""

    error: EngineRefused


def after_refusal(
    refused: EngineRefused, *, excused: bool, spent: int, max_spent: int, refusals: int, config: RetryConfig, luck: float
) -> Again | GiveUp:
    """`excused`: the engine was closed while the call ran. `spent` are the turn's generations, this one among them;
    `refusals` how often in a row it was refused without cost, this time among them; `luck` is between 0 and 1."""
    if refused.status == 400:
        return GiveUp(refused)
    if excused:
        return Again(0, costs=False, retry=False)
    costless = free(refused)
    if costless and refusals >= config.max_refusals_per_turn:
        return GiveUp(EngineRefused(500, f"refused {refusals} times in a row (engine.retry.max_refusals_per_turn); the last: {refused}"))
    if not costless and spent >= max_spent:
        return GiveUp(spent_error(spent, refused))
    pause_s = backoff_s(refusals if costless else spent, config, luck)
    return Again(max(pause_s, min(refused.retry_after_s, config.max_retry_after_s)), costs=not costless, retry=refused.status is not None)


def free(refused: EngineRefused) -> bool:
    """Whether nothing was sampled for it, or its owner threw that away: it costs no generation."""
    return refused.status is None or refused.status in FULL


def backoff_s(times: int, config: RetryConfig, luck: float) -> float:
    """Full jitter: anything between nothing and a bound that doubles, so that those who failed together do not come together."""
    return luck * min(config.max_backoff_s, config.backoff_s * 2.0 ** min(times - 1, MAX_DOUBLINGS))


def spent_error(spent: int, last: Exception | None = None) -> EngineRefused:
    return EngineRefused(500, f"the turn's budget of {spent} generations is spent" + (f" ({last})" if last else ""))
