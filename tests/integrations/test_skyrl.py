"""SkyRL's own trainer, up to its advantages, on a run that meets faults: what it trains on is what it is without them.

A lost trial takes its group out of the step, as SkyRL's generator for Harbor does it: masked, with equal rewards, so that no
other group and no baseline moves. Steps of two numbers are two samples of the same prompts: a clean and a faulty generation are
of one step in two runs of the same seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from foreign import Driver
from ray_run import Stage, staged

from rollout_ft.testing.faults import Fault, Kind

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
SCRIPT = Path(__file__).parent / "drivers" / "run_skyrl.py"
TRAINED = (
    "names",
    "prompt_token_ids",
    "response_ids",
    "loss_masks",
    "rollout_logprobs",
    "stop_reasons",
    "rewards",
    "advantages",
    "is_last_step",
)


@dataclass
class SkyRL:
    stage: Stage
    driver: Driver

    async def trained_on(self, step: int, *fields: dict[str, Any], **asked: Any) -> dict[str, Any]:
        """Two samples of each prompt; `fields` are the columns of each."""
        prompts = [
            {"uid": f"p{i}", "prompt": [{"role": "user", "content": f"Explain tides, {i}."}], "env_class": None, "env_extras": extras}
            for i, extras in enumerate(fields)
        ]
        said = await self.driver.ask({"prompts": prompts, "prefix": "s", "step": step, **asked})
        assert "error" not in said or asked.get("fails"), said
        return said


@contextlib.asynccontextmanager
async def skyrl_on_a_run() -> AsyncGenerator[SkyRL]:
    async with staged() as stage:
        where = {"ROLLOUT_FT_GATEWAY_URL": stage.run.gateway_url, "ROLLOUT_FT_OPERATOR_KEY": stage.run.operator_key}
        driver = await Driver.start("skyrl", SCRIPT, **where)
        try:
            yield SkyRL(stage, driver)
        finally:
            await driver.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean() -> dict[str, Any]:
    async with skyrl_on_a_run() as skyrl:
        return await skyrl.trained_on(7, {}, {})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def skyrl(clean: Any) -> AsyncGenerator[SkyRL]:
    async with skyrl_on_a_run() as skyrl:
        yield skyrl


async def test_faults_change_nothing_that_is_trained_on(skyrl: SkyRL, clean: dict[str, Any]):
    faults = [
        Fault(Kind.ENGINE_KILL, "s-train-7-p0-0", 2, 12),
        Fault(Kind.CUT, "s-train-7-p0-1", 3),
        Fault(Kind.ACTOR_KILL, "s-train-7-p1-0", 2, 20),
    ]
    await skyrl.stage.arm(*faults)
    made = await skyrl.trained_on(7, {}, {"fail": ["infra", 3, 1]})
    assert {fault.id for fault in faults} <= set(await skyrl.stage.fired())
    assert {name: made[name] for name in TRAINED} == {name: clean[name] for name in TRAINED}
    assert made["names"] == ["p0_0", "p0_1", "p1_0", "p1_1"], "in the order of the input"
    assert (made["metrics"]["rollout_ft/restarts"], made["metrics"]["rollout_ft/trials_lost"]) == (2, 0)
    assert made["metrics"]["rollout_ft/faults_survived"] > clean["metrics"]["rollout_ft/faults_survived"] == 0


async def test_a_lost_trial_masks_its_group_and_moves_no_other(skyrl: SkyRL):
    made = await skyrl.trained_on(8, {"unscored": False}, {"fail": ["infra", 2, 3]}, trial={"max_restarts": 1})
    assert [reason == "error" for reason in made["stop_reasons"]] == [False, False, True, True]
    assert made["response_ids"][2:] == made["loss_masks"][2:] == [[0], [0]]
    assert made["rewards"][2:] == [0.0, 0.0], "equal: there is no advantage in them"
    assert made["advantages"][2:] == [[0.0], [0.0]]
    assert sum(map(abs, made["advantages"][0])) > 0
    assert made["metrics"]["rollout_ft/groups_masked"] == 1
    assert made["metrics"]["generate/min_num_tokens"] > 1, "what is masked is no part of the figures"
    trials = [await skyrl.stage.run.client.trial(f"s-train-8-p1-{i}") for i in range(2)]
    assert {(trial["outcome"], trial["reward"]) for trial in trials} == {("infra_exhausted", None)}


async def test_a_trial_that_nobody_scored_is_no_reward_of_zero(skyrl: SkyRL):
    made = await skyrl.trained_on(9, {"unscored": True}, {})
    assert made["stop_reasons"][:2] == ["error", "error"]
    assert made["metrics"]["rollout_ft/groups_masked"] == 1


async def test_what_is_longer_than_skyrl_allows_is_cut(skyrl: SkyRL):
    made = await skyrl.trained_on(10, {}, config={"max_input_length": 300, "apply_overlong_filtering": True}, max_generate_length=64)
    for prompt, response, mask, reason in zip(
        made["prompt_token_ids"], made["response_ids"], made["loss_masks"], made["stop_reasons"], strict=True
    ):
        assert len(prompt) + len(response) == 300 + 64
        assert (reason, sum(mask)) == ("length", 0), "SkyRL's own filter knows it by its stop reason"


async def test_each_path_is_a_step_where_skyrl_trains_step_by_step(skyrl: SkyRL):
    made = await skyrl.trained_on(11, {"compact": 3}, {}, config={"step_wise_trajectories": True})
    assert made["names"] == ["p0_0", "p0_0", "p0_1", "p0_1", "p1_0", "p1_1"]
    assert made["is_last_step"] == [False, True, False, True, True, True]
    assert [step[0] != 0 for step in made["advantages"]] == [True] * 6
    assert made["advantages"][0][0] == made["advantages"][1][0], "a trial has one advantage"


async def test_a_wrong_key_ends_the_step_instead_of_masking_every_group(skyrl: SkyRL):
    said = await skyrl.trained_on(12, {}, operator_key="wrong", fails=True)
    assert (said["error"], "key" in said["words"]) == ("BadRequest", True)
