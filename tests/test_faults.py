"""Each fault by itself, on real Ray with real processes: the trial finishes, and its data is that of a trial without.

Every fault names (trial, turn, token), is met while the generation is in flight, and fires once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from ray_run import Stage, staged

from rollout_ft.config import TrialConfig
from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.types import Recovery

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "timeout_s": 2.0, "max_tokens": 48}
KINDS = [kind for kind in Kind if kind not in (Kind.SLOW, Kind.CUT)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    async with staged() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(stage: Stage) -> dict[str, Any]:
    """The trial without a fault: what every other must equal."""
    result, trajectory = await stage.play("clean", TASK)
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    return {"reward": result.reward, "trajectory": trajectory}


async def check(stage: Stage, clean: dict[str, Any], fault: Fault, task: dict[str, Any]) -> Any:
    """Plays the task under the fault and compares everything that a trainer gets."""
    await stage.whole()
    name = fault.trial_id.removesuffix("-q")
    result, trajectory = await stage.play(name, task, fault)
    assert fault.id in await stage.fired()
    assert (result.outcome, result.reward) == ("completed", clean["reward"])
    for key in ("token_ids", "loss_mask", "logprobs", "version_spans"):
        assert [p[key] for p in trajectory["paths"]] == [p[key] for p in clean["trajectory"]["paths"]], key
    meta = trajectory["metadata"]
    assert (meta["turns_committed"], meta["turns_in_trajectory"]) == (task["turns"], task["turns"])
    return result


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_trial_survives(stage: Stage, clean: dict[str, Any], kind: Kind, turn: int):
    if kind is Kind.GATEWAY_KILL and turn == 1:
        turn = 3
    await check(stage, clean, Fault(kind, f"{kind}{turn}-q", turn, 16), TASK)


@pytest.mark.parametrize("turn", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_is_cut_is_a_phantom_and_its_retry_is_served(stage: Stage, clean: dict[str, Any], stream: bool, turn: int):
    task = {**TASK, "stream": stream}
    result = await check(stage, clean, Fault(Kind.CUT, f"cut{stream}{turn}-q", turn), task)
    # No SDK repeats a stream that has begun: there it is the trial that comes back for the reply.
    assert (result.attempts, result.tokens_wasted) == (2 if stream else 1, 0)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("turn", [1, 2])
async def test_a_generation_longer_than_the_client_waits_is_attached_to(stage: Stage, clean: dict[str, Any], turn: int, hidden: bool):
    task = {**TASK, "hide_timeout": hidden}
    result = await check(stage, clean, Fault(Kind.SLOW, f"slow{hidden}{turn}-q", turn, 4, 14.0), task)
    assert (result.attempts, result.tokens_wasted) == (1, 0)


async def test_an_engine_that_dies_is_continued_from_its_last_token(stage: Stage, clean: dict[str, Any]):
    result = await check(stage, clean, Fault(Kind.ENGINE_KILL, "continued-q", 2, 24), TASK)
    assert result.tokens_reused >= 20
    assert (result.attempts, result.tokens_wasted) == (1, 0)


async def test_without_recovery_the_fault_ends_the_trial_with_no_reward(stage: Stage):
    await stage.whole()
    config = TrialConfig(recovery=Recovery.ABANDON)
    result, _ = await stage.play("abandon", TASK, Fault(Kind.ENGINE_KILL, "abandon-q", 2, 16), config=config)
    assert (result.outcome, result.reward) == ("infra_exhausted", None)
    assert "engine_lost" in result.cause or "InternalServerError" in result.cause


async def test_a_restart_from_nothing_pays_for_its_turns_again(stage: Stage, clean: dict[str, Any]):
    await stage.whole()
    config = TrialConfig(recovery=Recovery.RESTART)
    result, trajectory = await stage.play("scratch", TASK, Fault(Kind.CUT, "scratch-q", 3), config=config)
    assert (result.outcome, result.reward, result.attempts) == ("completed", clean["reward"], 2)
    assert trajectory["paths"][0]["token_ids"] == clean["trajectory"]["paths"][0]["token_ids"]


async def test_when_the_budget_of_restarts_is_spent_the_reward_is_none_and_never_zero(stage: Stage):
    await stage.whole()
    config = TrialConfig(max_restarts=0)
    result, _ = await stage.play("budget", TASK, Fault(Kind.AGENT_KILL, "budget-q", 2, 8), config=config)
    assert (result.outcome, result.reward) == ("infra_exhausted", None)
    assert "max_restarts" in result.cause
