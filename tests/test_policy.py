"""When a trial is over, and what its reward is: P4."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.config import TrialConfig
from rollout_ft.trial.policy import AttemptEnd, Blame, End, Finish, Restart, Spent, decide, resumed
from rollout_ft.types import Outcome, Recovery

few = settings(max_examples=50, deadline=None)

ENDS = st.builds(
    AttemptEnd,
    end=st.sampled_from(End),
    reward=st.none() | st.floats(-10, 10),
    cause=st.text(max_size=5),
    blame=st.sampled_from(Blame),
    tainted=st.booleans(),
)
RECOVERIES = st.sampled_from(Recovery)
SPENT = st.builds(Spent, st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))


def config(recovery: Recovery = Recovery.RESUME, limit: int = 3) -> TrialConfig:
    return TrialConfig(recovery=recovery, max_restarts=limit, max_env_restarts=limit, max_agent_restarts=limit, max_version_restarts=limit)


@pytest.mark.parametrize(
    ("ended", "outcome", "reward"),
    [
        (AttemptEnd(End.RETURNED, 1.0), Outcome.COMPLETED, 1.0),
        (AttemptEnd(End.RETURNED, 0.0), Outcome.COMPLETED, 0.0),
        (AttemptEnd(End.RETURNED, None), Outcome.COMPLETED, None),
        (AttemptEnd(End.TIMED_OUT, 1.0), Outcome.TRUNCATED, None),
        (AttemptEnd(End.LIMITED, 1.0), Outcome.TRUNCATED, None),
        (AttemptEnd(End.RAISED, 1.0, "no such problem", Blame.DATA), Outcome.AGENT_FAILED, None),
    ],
)
@pytest.mark.parametrize("recovery", Recovery)
def test_an_attempt_without_a_fault_ends_its_trial(ended: AttemptEnd, outcome: Outcome, reward: float | None, recovery: Recovery):
    decision = decide(ended, Spent(), config(recovery))
    assert isinstance(decision, Finish)
    assert (decision.outcome, decision.reward) == (outcome, reward)


FAULTS = {
    "infra": [
        AttemptEnd(End.DIED),
        AttemptEnd(End.RAISED, None, "APIConnectionError", Blame.INFRA),
        AttemptEnd(End.RETURNED, 1.0, tainted=True),
        AttemptEnd(End.RAISED, None, "ValueError", tainted=True),
        AttemptEnd(End.RAISED, None, "EnvironmentLost", Blame.ENVIRONMENT, tainted=True),
        AttemptEnd(End.TIMED_OUT, tainted=True),
    ],
    "environment": [AttemptEnd(End.RAISED, None, "EnvironmentLost", Blame.ENVIRONMENT)],
    "agent": [AttemptEnd(End.RAISED, None, "ValueError"), AttemptEnd(End.STUCK)],
}
OVER = {"infra": Outcome.INFRA_EXHAUSTED, "environment": Outcome.ENV_FAILED, "agent": Outcome.AGENT_FAILED}


@pytest.mark.parametrize(("budget", "ended"), [(budget, ended) for budget, ends in FAULTS.items() for ended in ends])
@pytest.mark.parametrize(
    ("recovery", "restarts", "expected"),
    [
        (Recovery.RESUME, 0, True),
        (Recovery.RESTART, 0, False),
        (Recovery.RESUME, 2, True),
        (Recovery.RESUME, 3, None),
        (Recovery.RESTART, 3, None),
        (Recovery.ABANDON, 0, None),
    ],
)
def test_each_kind_of_fault_has_a_budget_of_its_own(
    budget: str, ended: AttemptEnd, recovery: Recovery, restarts: int, expected: bool | None
):
    spent = replace(Spent(9, 9, 9, 9), **{budget: restarts})
    decision = decide(ended, spent, config(recovery))
    if expected is None:
        assert isinstance(decision, Finish)
        assert (decision.outcome, decision.reward) == (OVER[budget], None)
    else:
        assert decision == Restart(expected, decision.cause, budget)


@few
@given(ENDS, SPENT, st.integers(0, 5), RECOVERIES)
def test_a_reward_comes_only_with_a_completed_trial(ended: AttemptEnd, spent: Spent, limit: int, recovery: Recovery):
    decision = decide(ended, spent, config(recovery, limit))
    if isinstance(decision, Finish) and decision.reward is not None:
        assert decision.outcome is Outcome.COMPLETED
        assert decision.reward == ended.reward


@few
@given(ENDS, SPENT, st.integers(0, 5), RECOVERIES)
def test_a_tainted_attempt_never_gives_a_reward_nor_blames_the_agent(ended: AttemptEnd, spent: Spent, limit: int, recovery: Recovery):
    decision = decide(replace(ended, tainted=True), spent, config(recovery, limit))
    if isinstance(decision, Finish):
        assert (decision.outcome, decision.reward) == (Outcome.INFRA_EXHAUSTED, None)


@few
@given(ENDS, SPENT, st.integers(0, 5), RECOVERIES)
def test_an_attempt_that_is_followed_by_another_says_why(ended: AttemptEnd, spent: Spent, limit: int, recovery: Recovery):
    decision = decide(ended, spent, config(recovery, limit))
    if isinstance(decision, Restart) or decision.outcome is Outcome.INFRA_EXHAUSTED:
        assert decision.cause


@few
@given(st.lists(ENDS, min_size=30, max_size=30), st.integers(0, 5), RECOVERIES)
def test_a_trial_is_never_restarted_more_often_than_its_budgets_allow(ends: list[AttemptEnd], limit: int, recovery: Recovery):
    spent = Spent()
    for ended in ends:
        decision = decide(ended, spent, config(recovery, limit))
        if isinstance(decision, Finish):
            break
        spent = spent.and_one(decision.spends)
    assert max(spent.infra, spent.environment, spent.agent) <= limit


@pytest.mark.parametrize(
    ("recovery", "expected"),
    [
        (Recovery.RESUME, Restart(True, "the run was stopped")),
        (Recovery.RESTART, Restart(False, "the run was stopped")),
        (Recovery.ABANDON, Finish(Outcome.INFRA_EXHAUSTED, None, "the run was stopped")),
    ],
)
def test_a_trial_that_was_left_unfinished_goes_on_as_its_recovery_says(recovery: Recovery, expected: object):
    assert resumed(recovery) == expected
