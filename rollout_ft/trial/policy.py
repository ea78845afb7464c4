"""What follows when an attempt ends, or a run that was stopped goes on: the trial is over, or it is started again.

Owns the rules of P4. Pure. An infrastructure fault is never a reward: an attempt that is tainted counts as ended by
infrastructure whatever its agent said, and when the budget is spent the reward is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rollout_ft.session.divergence import DIVERGED
from rollout_ft.session.freshness import REFUSED, SCRATCH
from rollout_ft.types import Outcome, Recovery


class End(StrEnum):
    """How an attempt's agent ended."""

    RETURNED = "returned"
    RAISED = "raised"
    DIED = "died"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """`infra`: what the agent raised is what a client raises when the infrastructure fails it."""

    end: End
    reward: float | None = None
    cause: str = ""
    infra: bool = False
    tainted: bool = False
    fault: str = ""
    """What the attempt met that it does not survive, in the words of the run."""


@dataclass(frozen=True, slots=True)
class Finish:
    outcome: Outcome
    reward: float | None
    cause: str


@dataclass(frozen=True, slots=True)
class Restart:
    """Start another attempt, from the checkpoint or from nothing."""

    checkpoint: bool
    cause: str
    costs: bool = True
    """Whether it counts against what infrastructure faults may cost."""


def decide(
    ended: AttemptEnd, *, restarts: int, max_restarts: int, recovery: Recovery, anew: int = 0, max_anew: int = 0
) -> Finish | Restart:
    """`restarts` are those that infrastructure faults cost this trial so far, `anew` those for its tokens' versions."""
    if ended.fault.startswith(REFUSED):
        return Finish(Outcome.TRUNCATED, None, ended.fault)
    if ended.fault.startswith(DIVERGED):  # again it would diverge again
        return Finish(Outcome.INFRA_EXHAUSTED, None, f"{ended.fault} (trial.on_divergence: fail)")
    if ended.fault.startswith(SCRATCH):
        if anew >= max_anew:
            return Finish(Outcome.INFRA_EXHAUSTED, None, f"{ended.fault}; {anew} times (trial.max_version_restarts)")
        return Restart(False, ended.fault, costs=False)
    faulty = ended.tainted or ended.infra or ended.end is End.DIED
    if not faulty:
        match ended.end:
            case End.RETURNED:
                return Finish(Outcome.COMPLETED, ended.reward, "")
            case End.TIMED_OUT:
                return Finish(Outcome.TRUNCATED, None, ended.cause)
            case _:
                return Finish(Outcome.AGENT_FAILED, None, ended.cause)
    cause = ended.cause or ("a request was never answered" if ended.tainted else "the agent's process died")
    if recovery is Recovery.ABANDON:
        return Finish(Outcome.INFRA_EXHAUSTED, None, cause)
    if restarts >= max_restarts:
        return Finish(Outcome.INFRA_EXHAUSTED, None, f"{cause}; {restarts} restarts (trial.max_restarts)")
    return Restart(recovery is Recovery.RESUME, cause)


def resumed(recovery: Recovery) -> Finish | Restart:
    """What becomes of a trial that an earlier process of the run left unfinished. It costs no restart: who stops a run
    and goes on with it must not spend what is there for faults."""
    cause = "the run was stopped"
    if recovery is Recovery.ABANDON:
        return Finish(Outcome.INFRA_EXHAUSTED, None, cause)
    return Restart(recovery is Recovery.RESUME, cause)
