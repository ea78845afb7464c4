"""slime's and miles' own group generation with our generate function in it, and miles' own driver at our gateway.

Real gateways, sessions, stores and engine processes, of which some are killed in the middle; Ray is left out. miles is the
package `miles-rl` of the index, its own classes and code. slime is on no index in a version that can be used (`slime 0.0.0`
there is something else): its tests run against what it documents (`stand_ins/slime`), or with ROLLOUT_FT_SLIME against a
checkout.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from foreign import ROOT, Driver

from rollout_ft.config import Config
from rollout_ft.testing.local_run import LocalRun, local_run

pytestmark = pytest.mark.timeout(300)
HERE = Path(__file__).parent
SLIME = os.environ.get("ROLLOUT_FT_SLIME", str(HERE / "stand_ins"))
TRAINERS = ["miles", "slime"]
TURNS = 4
Sample = dict[str, Any]


@dataclass
class Trainer:
    """A trainer's process, and the run that it talks to."""

    name: str
    driver: Driver
    run: LocalRun

    async def group(self, *, samples: int = 2, on_turn: int = 0, **asked: Any) -> dict[str, Any]:
        """A group of samples; engines and a gateway are killed when an agent has its turn `on_turn`."""
        run = self.run
        args = {
            "custom_generate_function_path": f"rollout_ft.integrations.{self.name}.generate", "rollout_ft_agent": "sample_agents:run",
            "dynamic_sampling_filter_path": f"rollout_ft.integrations.{self.name}.keep_whole_groups",
            "rollout_ft_gateway_url": run.url, "rollout_ft_operator_key": run.keys.operator, **asked.pop("args", {}),
        }  # fmt: skip
        metadata = {"turns": TURNS, **asked.pop("metadata", {})}
        await self.driver.tell({"args": args, "prompt": "Explain tides.", "samples": samples, "metadata": metadata, **asked})
        while True:
            said = await self.driver.hear()
            if "turn" not in said:
                return said
            if said["turn"] == on_turn:
                on_turn = 0
                await self._kill()

    async def _kill(self) -> None:
        self.run.crew.engines["engine-0"].unit.kill()
        await self.run.gateways[0].die()

    def ended(self) -> list[str]:
        """How trials ended since this was asked last."""
        return [e["outcome"] for e in self.run.events.take() if e["event"] == "trial.ended"]


@contextlib.asynccontextmanager
async def trainer(name: str, **gateway: Any) -> AsyncGenerator[Trainer]:
    args = ["--model", "hash", "--tokens-per-s", "60"]
    engine = {"count": 2, "stream_interval_tokens": 4, "args": args, "partial_flush_s": 0.1}
    config = Config.model_validate({"engine": engine, "gateway": {"ping_s": 0.5, **gateway}})
    async with local_run(config, gateways=2) as run:
        driver = await Driver.start("miles", HERE / "drivers/run_samples.py", name, PYTHONPATH=f"{ROOT}:{SLIME}", HF_HUB_OFFLINE="1")
        try:
            yield Trainer(name, driver, run)
        finally:
            await driver.aclose()


def judge(sample: Sample) -> None:
    """What holds of every sample that can be trained on."""
    assert sample["status"] in ("completed", "truncated")
    assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"]) == sample["response_length"] < len(sample["tokens"])
    assert all(p < 0 or not m for p, m in zip(sample["rollout_log_probs"], sample["loss_mask"], strict=True))
    assert sample["loss_mask"][0] == sample["loss_mask"][-1] == 1
    assert len([k for k, _ in itertools.groupby(sample["loss_mask"]) if k]) == TURNS
    assert (set(sample["weight_versions"]), sample["remove_sample"]) == ({"v0"}, False)


def trained(group: list[Sample]) -> list[Any]:
    return [(s["tokens"], s["loss_mask"], s["rollout_log_probs"], s["reward"], s["status"]) for s in group]


@pytest.mark.parametrize("name", TRAINERS)
async def test_a_group_is_the_same_whether_its_infrastructure_failed_or_not(name: str):
    async with trainer(name) as t:
        calm = await t.group()
        stormy = await t.group(on_turn=2)
        for sample in calm["samples"] + stormy["samples"]:
            judge(sample)
        assert trained(calm["samples"]) == trained(stormy["samples"])
        assert len({tuple(s["tokens"]) for s in calm["samples"]}) == 2
        assert (calm["kept"], stormy["kept"]) == (True, True)


@pytest.mark.parametrize("name", TRAINERS)
async def test_an_agent_that_lost_its_network_goes_on_from_its_checkpoint(name: str):
    async with trainer(name) as t:
        calm = await t.group(samples=1)
        again = await t.group(samples=1, metadata={"fail": [2, 1]})
        assert trained(calm["samples"]) == trained(again["samples"])
        told = again["samples"][0]["metadata"]["rollout_ft"]
        assert (told["attempts"], told["turns_replayed"]) == (2, 2)


@pytest.mark.parametrize("name", TRAINERS)
async def test_a_trial_that_is_lost_is_aborted_never_scored_and_takes_its_group_along(name: str):
    async with trainer(name) as t:
        lost = await t.group(metadata={"fail": [1, 99]}, args={"rollout_ft_trial": {"max_restarts": 1}})
        for sample in lost["samples"]:
            assert (sample["status"], sample["reward"], sample["loss_mask"], sample["tokens"]) == ("aborted", None, [], [])
            assert sample["remove_sample"]
        assert (lost["kept"], lost["reason"]) == (False, "lost_trial")
        once = {"rollout_ft_trial": {"max_restarts": 0}}
        if name == "miles":
            theirs = {"dynamic_sampling_filter_path": "miles.rollout.filter_hub.dynamic_sampling_filters.check_no_aborted"}
            assert not (await t.group(metadata={"fail": [1, 99]}, args={**once, **theirs}))["kept"]
        seen = await t.group(samples=1, metadata={"fail": [1, 99]}, evaluation=True, args=once)
        assert (seen["samples"][0]["status"], seen["samples"][0]["reward"]) == ("aborted", "nan")


@pytest.mark.parametrize("name", TRAINERS)
async def test_the_trainers_reward_function_scores_what_the_agent_did_not_and_its_limit_cuts(name: str):
    async with trainer(name) as t:
        (whole,) = (await t.group(samples=1, metadata={"unscored": True}))["samples"]
        judge(whole)
        assert float(whole["reward"]) == whole["response_length"]
        size = len(whole["tokens"]) - 5
        (cut,) = (await t.group(samples=1, metadata={"unscored": True}, args={"rollout_max_context_len": size}))["samples"]
        assert (cut["tokens"], cut["status"], float(cut["reward"])) == (whole["tokens"][:size], "truncated", cut["response_length"])


@pytest.mark.parametrize("name", TRAINERS)
async def test_a_trainer_that_wants_no_more_samples_gets_them_back_at_once_and_nothing_goes_on(name: str):
    async with trainer(name) as t:
        given_up = await t.group(metadata={"turns": 500}, abort_after_s=2.0)
        assert [s["status"] for s in given_up["samples"]] == ["aborted", "aborted"]
        assert t.ended() == ["cancelled"] * 2


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"group_rm": True}, "group_rm"), ({"partial_rollout": True}, "partial_rollout"),
        ({"dynamic_sampling_filter_path": None}, "keep_whole_groups"),
    ],
)  # fmt: skip
async def test_settings_that_would_score_a_lost_trial_are_refused(name: str, args: dict[str, Any], said: str):
    driver = await Driver.start(
        "miles", HERE / "drivers/run_samples.py", name, PYTHONPATH=":".join((str(ROOT), SLIME)), HF_HUB_OFFLINE="1"
    )  # fmt: skip
    ours = {"custom_generate_function_path": f"rollout_ft.integrations.{name}.generate", "rollout_ft_agent": "sample_agents:run"}
    kept = {"dynamic_sampling_filter_path": f"rollout_ft.integrations.{name}.keep_whole_groups"}
    try:
        said_so = await driver.ask({"args": {**ours, **kept, **args}, "prompt": "a"})
        assert said in said_so["error"]
    finally:
        await driver.aclose()


async def test_miles_own_agent_function_is_given_a_key_and_leaves_its_notes():
    async with trainer("miles") as t:
        theirs = {"rollout_ft_agent": None, "custom_agent_function_path": "sample_agents.theirs"}
        (sample,) = (await t.group(samples=1, args=theirs))["samples"]
        judge(sample)
        assert len(sample["metadata"]["said"]) == TURNS
        assert float(sample["reward"]) == sample["response_length"]


async def test_miles_own_driver_at_our_gateway_gets_its_samples_through_the_death_of_an_engine_and_a_gateway():
    async with trainer("miles", open_sessions="v1") as t:
        ip, _, port = t.run.url.removeprefix("http://").partition(":")
        at_ours = {
            "custom_generate_function_path": "miles.rollout.generate_hub.agentic_tool_call.generate", "session_server_ip": ip,
            "session_server_port": int(port), "custom_agent_function_path": "sample_agents.theirs", "dynamic_sampling_filter_path": None,
        }  # fmt: skip
        stops = {"stop": ["e"], "max_new_tokens": 500}  # this version of its driver takes no turn that was cut by its limit
        group = await t.group(samples=3, on_turn=2, args=at_ours, sampling=stops)
        assert "error" not in group, group
        for sample in group["samples"]:
            judge(sample)
            assert sample["metadata"]["accumulated_token_ids"] == sample["tokens"]
            assert all(words in sample["response"] for words in sample["metadata"]["said"])
            assert float(sample["reward"]) == sample["response_length"]
        assert t.ended() == ["completed"] * 3
