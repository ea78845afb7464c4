"""What follows when an attempt ends, or a run that was stopped goes on: the trial is over, or it is started again.

Owns the rules of P4. Pure. An infrastructure fault is never a reward: an attempt that is tainted counts as ended by
infrastructure whatever its agent said, and when the budget is spent the reward is None, never 0. Each kind of fault has a
budget of its own, over all attempts of a trial.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from rollout_ft.config import TrialConfig
from rollout_ft.session.freshness import DIVERGED, REFUSED, SCRATCH
from rollout_ft.types import Outcome, Recovery


class End(StrEnum):
    """How an attempt's agent ended."""

    RETURNED = "returned"
    RAISED = "raised"
    DIED = "died"
    TIMED_OUT = "timed_out"
    LIMITED = "limited"
    """The conversation reached a limit: of the model's context, or of the session."""
    STUCK = "stuck"
    """It asked for nothing, while nothing was asked of it."""


class Blame(StrEnum):
    """Whose fault an end is, where the agent did not return: told by whoever saw it happen."""

    AGENT = "agent"
    INFRA = "infra"
    ENVIRONMENT = "environment"
    DATA = "data"
    """The task itself: another attempt at it ends the same way."""


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    end: End
    reward: float | None = None
    cause: str = ""
    blame: Blame = Blame.AGENT
    tainted: bool = False
    fault: str = ""
    """What the attempt met that it does not survive, in the words of the run."""


@dataclass(frozen=True, slots=True)
class Finish:
    outcome: Outcome
    reward: float | None
    cause: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Restarts so far, by what they were for; `environment` counts the environments that were replaced as well."""

    infra: int = 0
    environment: int = 0
    agent: int = 0
    versions: int = 0
    """Its tokens had to be of other weights."""

    def and_one(self, what: str) -> Spent:
        return replace(self, **{what: getattr(self, what) + 1}) if what else self


@dataclass(frozen=True, slots=True)
class Restart:
    """Start another attempt, from the checkpoint or from nothing. `spends` names the budget, if it costs one."""

    checkpoint: bool
    cause: str
    spends: str = ""


def decide(ended: AttemptEnd, spent: Spent, config: TrialConfig) -> Finish | Restart:
    """What the end of an attempt means to its trial."""
    if ended.fault.startswith(REFUSED):
        return Finish(Outcome.TRUNCATED, None, ended.fault)
    if ended.fault.startswith(DIVERGED):  # again it would diverge again
        return Finish(Outcome.INFRA_EXHAUSTED, None, f"{ended.fault} (trial.on_divergence: fail)")
    if ended.fault.startswith(SCRATCH):
        if spent.versions >= config.max_version_restarts:
            return Finish(Outcome.INFRA_EXHAUSTED, None, f"{ended.fault}; {spent.versions} times (trial.max_version_restarts)")
        return Restart(False, ended.fault, "versions")
    failed = ended.end in (End.RAISED, End.STUCK)
    if ended.tainted or ended.end is End.DIED or (failed and ended.blame is Blame.INFRA):
        cause = "a request was never answered" if ended.tainted else "the agent's process died"
        return _again(ended.cause or cause, "infra", spent, config)
    if ended.blame is Blame.ENVIRONMENT:
        return _again(ended.cause or "it was lost", "environment", spent, config)
    match ended.end:
        case End.RETURNED:
            return Finish(Outcome.COMPLETED, ended.reward, "")
        case End.TIMED_OUT | End.LIMITED:
            return Finish(Outcome.TRUNCATED, None, ended.cause)
        case _ if ended.blame is Blame.DATA:
            return Finish(Outcome.AGENT_FAILED, None, f"the task: {ended.cause}")
        case _:
            return _again(ended.cause or ended.end.value, "agent", spent, config)


_BUDGETS = {
    "infra": ("max_restarts", Outcome.INFRA_EXHAUSTED),
    "environment": ("max_env_restarts", Outcome.ENV_FAILED),
    "agent": ("max_agent_restarts", Outcome.AGENT_FAILED),
}
"""What each allows (`trial.…`), and how a trial ends when that is spent."""


def _again(cause: str, budget: str, spent: Spent, config: TrialConfig) -> Finish | Restart:
    """Another attempt, while the budget lasts."""
    key, over = _BUDGETS[budget]
    restarts: int = getattr(spent, budget)
    if config.recovery is Recovery.ABANDON:
        return Finish(over, None, cause)
    if restarts >= getattr(config, key):
        return Finish(over, None, f"{cause}; {restarts} restarts (trial.{key})")
    return Restart(config.recovery is Recovery.RESUME, cause, budget)


def resumed(recovery: Recovery) -> Finish | Restart:
    """What becomes of a trial that an earlier process of the run left unfinished. It costs no restart: who stops a run
    and goes on with it must not spend what is there for faults."""
    cause = "the run was stopped"
    if recovery is Recovery.ABANDON:
        return Finish(Outcome.INFRA_EXHAUSTED, None, cause)
    return Restart(recovery is Recovery.RESUME, cause)
