"""An engine's calls: how many it is given at once, and how often they are made again.

Owns the keys `engine.admission.…` and `engine.retry.…`. Does not know how long a call may take, which is a matter of the
engine. What is over a limit waits, and what has no place to wait is refused.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from rollout_ft.config.base import Seconds, Settings


class AdmissionConfig(Settings):
    """How many calls an engine is given at once: what it can bear, found out by how soon it gives first tokens."""

    min_calls: int = Field(default=4, ge=1)
    max_calls: int = Field(default=1024, ge=1)
    start_calls: int = Field(default=64, ge=1)
    """To begin with, where the engine does not say how many it can run."""
    first_token_target_s: Seconds = 2
    """No first token that comes sooner is late."""
    first_token_tolerance: float = Field(default=3, gt=1)
    """Beyond that one is late that takes so many times what the engine takes when it is not busy."""
    window_s: Seconds = 1
    """The limit rises once in so long at most."""
    max_waiting: int = Field(default=4096, ge=1)
    """Turns that wait for the engine; one more is answered 429."""
    max_head_start_s: Seconds = 600
    """Of those that wait the trial that began first is served first; none overtakes another that came so long before it."""

    @model_validator(mode="after")
    def _calls_fit(self) -> AdmissionConfig:
        if not self.min_calls <= self.start_calls <= self.max_calls:
            raise ValueError("engine.admission: min_calls <= start_calls <= max_calls must hold")
        return self


class RetryConfig(Settings):
    """Engine calls that are made again."""

    share: float = Field(default=0.2, ge=0, le=1)
    """Of an engine's calls that may be retries; one beyond that waits."""
    floor_per_s: float = Field(default=1, gt=0)
    """Retries of an engine that are always allowed."""
    burst: float = Field(default=32, ge=1)
    """Retries that may be made at once, after a quiet time: the sessions of an engine that was lost come together."""
    backoff_s: Seconds = 0.2
    """The first retry of a turn waits up to so long, each after it up to twice as long as the one before."""
    max_backoff_s: Seconds = 5
    max_retry_after_s: Seconds = 60
    """An engine that asks for more with Retry-After is asked again after this."""
    max_refusals_per_turn: int = Field(default=64, ge=1)
    """How often in a row an engine may have no room for a turn before the turn fails. It costs none of its generations."""
    max_retries_per_trial: int = Field(default=256, ge=1)
    """Generations beyond the first of each turn, all turns of a trial together."""
