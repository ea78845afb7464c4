"""How long an attempt may go on, and how it is seen that its agent is stuck.

Owns these limits. Pure. An agent that waits, for a turn or for a tool, is not stuck however long that takes: whoever it waits for has
limits of its own. The time in which the trainer kept the engines still is nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_ft.config import TrialConfig
from rollout_ft.trial.policy import AttemptEnd, Blame, End

SOON_S = 0.05
"""How much longer than a limit is waited before it is looked whether it has passed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An attempt, looked at. `elapsed_s`: since it began; `still_s`: of that, how long the fleet was kept still; `waiting`: requests
    of it that are not answered yet; `turn_s`: how long the oldest of them has been generated for; `tool`: it waits for its
    environment; `quiet_s`: since it last began or ended to wait for anything; `turns`: how many turns it has had."""

    elapsed_s: float
    still_s: float = 0.0
    waiting: int = 0
    turn_s: float = 0.0
    tool: bool = False
    quiet_s: float = 0.0
    turns: int = 0


def look_in_s(seen: Seen, config: TrialConfig) -> float:
    """When a limit may have passed at the earliest."""
    waits = [config.attempt_timeout_s - (seen.elapsed_s - seen.still_s)]
    if not (seen.waiting or seen.tool):
        waits.append(config.agent_idle_s - min(seen.quiet_s, seen.elapsed_s))
    else:
        waits.append(config.agent_idle_s)
    if config.turn_timeout_s is not None:
        waits.append(config.turn_timeout_s - seen.turn_s if seen.waiting else config.turn_timeout_s)
    return max(0.0, min(waits)) + SOON_S


def judge(seen: Seen, config: TrialConfig) -> AttemptEnd | None:
    """The end of an attempt that has passed a limit."""
    idle_s = min(seen.quiet_s, seen.elapsed_s)
    if not (seen.waiting or seen.tool) and idle_s >= config.agent_idle_s:
        cause = f"the agent is stuck: it has asked for nothing for {idle_s:.0f} s, after {seen.turns} turns (trial.agent_idle_s)"
        return AttemptEnd(End.STUCK, cause=cause, blame=Blame.AGENT)
    if config.turn_timeout_s is not None and seen.waiting and seen.turn_s >= config.turn_timeout_s:
        cause = f"turn {seen.turns + 1} was not done within {config.turn_timeout_s:g} s (trial.turn_timeout_s)"
        return AttemptEnd(End.TIMED_OUT, cause=cause)
    if seen.elapsed_s - seen.still_s >= config.attempt_timeout_s:
        return AttemptEnd(End.TIMED_OUT, cause=f"no end within {config.attempt_timeout_s:g} s (trial.attempt_timeout_s): {_doing(seen)}")
    return None


def _doing(seen: Seen) -> str:
    if seen.tool:
        return f"it was at a tool, after {seen.turns} turns"
    if seen.waiting:
        return f"it was in turn {seen.turns + 1}"
    return f"after {seen.turns} turns it had asked for nothing for {min(seen.quiet_s, seen.elapsed_s):.0f} s"
