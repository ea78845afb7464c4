"""When a trial is over, and what its reward is: P4."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.trial.policy import AttemptEnd, End, Finish, Restart, decide, resumed
from rollout_ft.types import Outcome, Recovery

few = settings(max_examples=50, deadline=None)

ENDS = st.builds(
    AttemptEnd,
    end=st.sampled_from(End),
    reward=st.none() | st.floats(-10, 10),
    cause=st.text(max_size=5),
    infra=st.booleans(),
    tainted=st.booleans(),
)
RECOVERIES = st.sampled_from(Recovery)


@pytest.mark.parametrize(
    ("ended", "outcome", "reward"),
    [
        (AttemptEnd(End.RETURNED, 1.0), Outcome.COMPLETED, 1.0),
        (AttemptEnd(End.RETURNED, 0.0), Outcome.COMPLETED, 0.0),
        (AttemptEnd(End.RETURNED, None), Outcome.COMPLETED, None),
        (AttemptEnd(End.RAISED, 1.0, "ValueError"), Outcome.AGENT_FAILED, None),
        (AttemptEnd(End.TIMED_OUT, 1.0), Outcome.TRUNCATED, None),
    ],
)
@pytest.mark.parametrize("recovery", Recovery)
def test_an_attempt_without_a_fault_ends_its_trial(ended: AttemptEnd, outcome: Outcome, reward: float | None, recovery: Recovery):
    decision = decide(ended, restarts=0, max_restarts=3, recovery=recovery)
    assert isinstance(decision, Finish)
    assert (decision.outcome, decision.reward) == (outcome, reward)


@pytest.mark.parametrize(
    "ended",
    [
        AttemptEnd(End.DIED),
        AttemptEnd(End.RAISED, None, "APIConnectionError", infra=True),
        AttemptEnd(End.RETURNED, 1.0, tainted=True),
        AttemptEnd(End.RAISED, None, "ValueError", tainted=True),
        AttemptEnd(End.TIMED_OUT, tainted=True),
    ],
)
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
def test_an_attempt_that_met_a_fault_is_started_again_while_the_budget_lasts(
    ended: AttemptEnd, recovery: Recovery, restarts: int, expected: bool | None
):
    decision = decide(ended, restarts=restarts, max_restarts=3, recovery=recovery)
    if expected is None:
        assert isinstance(decision, Finish)
        assert (decision.outcome, decision.reward) == (Outcome.INFRA_EXHAUSTED, None)
    else:
        assert isinstance(decision, Restart)
        assert decision.checkpoint is expected


@few
@given(ENDS, st.integers(0, 5), st.integers(0, 5), RECOVERIES)
def test_a_reward_comes_only_with_a_completed_trial(ended: AttemptEnd, restarts: int, limit: int, recovery: Recovery):
    decision = decide(ended, restarts=restarts, max_restarts=limit, recovery=recovery)
    if isinstance(decision, Finish) and decision.reward is not None:
        assert decision.outcome is Outcome.COMPLETED
        assert decision.reward == ended.reward


@few
@given(ENDS, st.integers(0, 5), st.integers(0, 5), RECOVERIES)
def test_a_tainted_attempt_never_gives_a_reward_nor_blames_the_agent(ended: AttemptEnd, restarts: int, limit: int, recovery: Recovery):
    decision = decide(replace(ended, tainted=True), restarts=restarts, max_restarts=limit, recovery=recovery)
    if isinstance(decision, Finish):
        assert (decision.outcome, decision.reward) == (Outcome.INFRA_EXHAUSTED, None)


@few
@given(ENDS, st.integers(0, 5), st.integers(0, 5), RECOVERIES)
def test_what_ends_by_infrastructure_says_why(ended: AttemptEnd, restarts: int, limit: int, recovery: Recovery):
    decision = decide(ended, restarts=restarts, max_restarts=limit, recovery=recovery)
    if isinstance(decision, Restart) or decision.outcome is Outcome.INFRA_EXHAUSTED:
        assert decision.cause


@few
@given(st.lists(ENDS, min_size=10, max_size=10), st.integers(0, 8), RECOVERIES)
def test_a_trial_is_never_restarted_more_often_than_its_budget_allows(ends: list[AttemptEnd], limit: int, recovery: Recovery):
    restarts = 0
    for ended in ends:
        if isinstance(decide(ended, restarts=restarts, max_restarts=limit, recovery=recovery), Finish):
            break
        restarts += 1
    assert restarts <= limit


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
