"""Who may go on with a run whose supervisor lives, and what becomes of its actors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import Config
from rollout_ft.fleet.crew import Setup
from rollout_ft.fleet.predecessor import Claim, judge

THEIRS = Setup(Config(), "ns", "secret")


def setup(secret: str = "secret", **changed: Any) -> Setup:
    return Setup(Config.model_validate(changed), "ns", secret)


def test_the_same_run_is_adopted():
    assert judge(setup(), THEIRS, ending=False) is Claim.ADOPTED


def test_what_only_the_runner_was_told_of_is_no_other_config():
    assert judge(setup(trial={"concurrency": 99, "max_restarts": 0}), THEIRS, ending=False) is Claim.ADOPTED


@pytest.mark.parametrize("changed", [{"engine": {"count": 1}}, {"orphan_s": 5}, {"store": {"replicas": 1}}])
def test_actors_that_were_told_something_else_are_not_adopted(changed: Any):
    assert judge(setup(**changed), THEIRS, ending=False) is Claim.OTHER_CONFIG


def test_a_run_that_is_ending_is_not_adopted():
    assert judge(setup(), THEIRS, ending=True) is Claim.ENDING


@given(
    count=st.integers(1, 5), ending=st.booleans(), secret=st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda s: s != "secret")
)
def test_without_the_secret_nothing_is_adopted_or_ended(count: int, ending: bool, secret: str):
    assert judge(setup(secret, engine={"count": count}), THEIRS, ending=ending) is Claim.OTHER_RUN
