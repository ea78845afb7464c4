"""verifiers' own rollout loop on a run that meets faults: the traces have the tokens that they have without them.

The environment, the agent, the harness' process, the interception server in front of it and the subprocess runtime are those
of verifiers. A trial of the same name gives the same tokens in two runs of one seed.
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

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]
SCRIPT = Path(__file__).parent / "drivers" / "run_verifiers.py"
NAMES = ("a", "b", "c", "d")
"""Of tasks: each name is a trial of its own, and so are its tokens."""


@dataclass
class Verifiers:
    stage: Stage
    driver: Driver

    async def play(self, *rows: dict[str, Any], **asked: Any) -> list[dict[str, Any]]:
        said = await self.driver.ask({"rows": [{"prompt": "Explain tides.", **row} for row in rows], "prefix": "vf", **asked})
        assert "episodes" in said, said
        self.launched = said["launched"]
        return said["episodes"]


@contextlib.asynccontextmanager
async def verifiers_on_a_run() -> AsyncGenerator[Verifiers]:
    async with staged() as stage:
        where = {"ROLLOUT_FT_GATEWAY_URL": stage.run.gateway_url, "ROLLOUT_FT_OPERATOR_KEY": stage.run.operator_key}
        driver = await Driver.start("verifiers", SCRIPT, **where)
        try:
            yield Verifiers(stage, driver)
        finally:
            await driver.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean() -> list[dict[str, Any]]:
    async with verifiers_on_a_run() as verifiers:
        return await verifiers.play(*({"name": name} for name in NAMES))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def verifiers(clean: Any) -> AsyncGenerator[Verifiers]:
    async with verifiers_on_a_run() as verifiers:
        yield verifiers


def trained(episode: dict[str, Any]) -> Any:
    return [(trace["reward"], trace["branches"]) for trace in episode["traces"]]


async def test_a_trace_has_the_tokens_that_the_engine_sampled(clean: list[dict[str, Any]]):
    for episode in clean:
        assert episode["ok"]
        [trace] = episode["traces"]
        [branch] = trace["branches"]
        assert len(branch["token_ids"]) == len(branch["mask"]) == len(branch["logprobs"])
        assert {logprob < 0 for logprob, sampled in zip(branch["logprobs"], branch["mask"], strict=True) if sampled} == {True}
        assert sum(branch["mask"]) > 30
        assert trace["metrics"]["rollout_ft/attempts"] == 1
    assert len({str(trained(episode)) for episode in clean}) == len(NAMES), "each is a sample of its own"


async def test_faults_change_no_token_and_no_reward(verifiers: Verifiers, clean: list[dict[str, Any]]):
    faults = [
        Fault(Kind.ENGINE_KILL, "vf-a", 2, 12),
        Fault(Kind.CUT, "vf-b", 2),
        Fault(Kind.ACTOR_KILL, "vf-c", 3, 6),
    ]
    await verifiers.stage.arm(*faults)
    made = await verifiers.play({"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "d", "fail": ["infra", 3, 1]})
    assert {fault.id for fault in faults} <= set(await verifiers.stage.fired())
    assert [trained(episode) for episode in made] == [trained(episode) for episode in clean]
    assert all(episode["ok"] for episode in made)
    assert made[3]["traces"][0]["metrics"]["rollout_ft/attempts"] == 2, "the harness was started again, and its trial went on"
    assert verifiers.launched["d"] == 2


async def test_a_trial_whose_faults_do_not_end_is_an_episode_that_is_not_ok(verifiers: Verifiers):
    [made] = await verifiers.play({"name": "lost", "fail": ["infra", 2, 9]}, trial={"max_restarts": 1})
    assert not made["ok"]
    assert made["errors"][-1][0] == "TrialLost"
    assert verifiers.launched["lost"] == 2
    trial = await verifiers.stage.run.client.trial("vf-lost")
    assert (trial["outcome"], trial["reward"]) == ("infra_exhausted", None)


async def test_an_error_of_the_harness_is_not_one_of_the_infrastructure(verifiers: Verifiers):
    [made] = await verifiers.play({"name": "bug", "fail": ["bug", 2, 9]})
    assert (made["ok"], verifiers.launched["bug"]) == (False, 2), "one more attempt (trial.max_agent_restarts)"
    assert (await verifiers.stage.run.client.trial("vf-bug"))["outcome"] == "agent_failed"
