"""Trials whose tokens are of versions that the config does not allow, through the runner on real Ray: they start from
scratch, at no cost to what is there for faults, or they are over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from ray_run import Stage, staged
from test_weight_updates import TASK, check_tokens, generating

from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.trial.fleet import Fleet

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

SETTINGS = ("engine.args=[--tokens-per-s,'100',--model,hash]", "trial.max_restarts=0")
IN_THE_SECOND_TURN = TASK["max_tokens"] + 8


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["trial", "restart", "refuse"])
async def stage(request: pytest.FixtureRequest) -> AsyncGenerator[Stage]:
    policy = {
        "trial": ["session.version_policy=trial"],
        "restart": ["session.max_staleness=0", "session.on_stale=restart"],
        "refuse": ["session.max_staleness=0", "session.on_stale=refuse"],
    }
    async with staged(*SETTINGS, *policy[request.param]) as made:
        yield made


async def test_an_update_in_the_second_turn_restarts_the_trial_from_scratch_or_ends_it(stage: Stage, request: pytest.FixtureRequest):
    fleet, policy = Fleet(stage.run.client), request.node.callspec.params["stage"]
    task = {**TASK, "sampling": {"temperature": 0}}
    trial = asyncio.create_task(stage.play("scratch", task))
    await generating(stage, IN_THE_SECOND_TURN)
    async with fleet.paused("retract"):
        await fleet.update("v1", path=str(MODEL_DIR))
    result, trajectory = await trial
    if policy == "refuse":
        assert (result.outcome, result.attempts) == ("truncated", 1)
        assert "session.max_staleness 0" in result.cause
        return
    assert (result.outcome, result.attempts, result.faults_survived) == ("completed", 2, 0)
    assert check_tokens(trajectory) == {"v1"}
    assert result.tokens_wasted >= IN_THE_SECOND_TURN
    assert result.tokens_generated == result.tokens_wasted + sum(sum(path["loss_mask"]) for path in trajectory["paths"])
