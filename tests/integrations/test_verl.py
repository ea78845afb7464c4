"""verl's own AgentLoopWorker on a run that meets faults: the batch is the one without them, and a lost trial is verl's own failure.

Both ways in: our agent loop, whose agent is restarted from its checkpoint, and verl's own loops on our client. Trials of two
prefixes have the same seeds, because verl is told to be deterministic: what differs between two batches is what befell them.
"""

from __future__ import annotations

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
DRIVERS = Path(__file__).parent / "drivers"
PROMPT = [{"role": "user", "content": "Explain tides."}]
ROLLOUT = "actor_rollout_ref.rollout."
LIMITS = {"prompt_length": 384, "response_length": 512, "full_determinism": True, "calculate_log_probs": True}


@dataclass
class Verl:
    stage: Stage
    driver: Driver

    async def ask(self, rows: list[dict[str, Any]], *faults: Fault, limits: dict[str, Any] | None = None, **said: Any) -> dict[str, Any]:
        await self.stage.arm(*faults)
        config = [f"{ROLLOUT}{name}={value}" for name, value in {**LIMITS, **(limits or {})}.items()]
        return await self.driver.ask({"rows": rows, "config": config, **said})

    async def trials(self, prefix: str, *faults: Fault, n: int = 2, limits: dict[str, Any] | None = None, trial: Any = None, **fields: Any):
        """`n` samples of one prompt, by our loop."""
        rows = [{"agent_name": "ours", "uid": "u", "priority": i, "index": 0, "raw_prompt": PROMPT, **fields} for i in range(n)]
        return await self.ask(rows, *faults, limits=limits, loop={"prefix": prefix, "trial": trial or {}})

    async def of_verl(self, prefix: str, *faults: Fault) -> list[dict[str, Any]]:
        """Two samples by verl's own single-turn loop on our client."""
        rows = [{"agent_name": "single_turn_agent", "priority": i, "raw_prompt": PROMPT} for i in (1, 2)]
        limits = {"response_length": 96}
        return samples(await self.ask(rows, *faults, limits=limits, client={"prefix": prefix}))


def where(stage: Stage) -> dict[str, str]:
    return {"ROLLOUT_FT_GATEWAY_URL": stage.run.gateway_url, "ROLLOUT_FT_OPERATOR_KEY": stage.run.operator_key}


def samples(said: dict[str, Any]) -> list[dict[str, Any]]:
    assert "samples" in said, said
    return said["samples"]


def trained(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a trainer trains on."""
    return [{name: value for name, value in sample.items() if name != "from"} for sample in said]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def verl() -> AsyncGenerator[Verl]:
    async with staged() as stage:
        driver = await Driver.start("verl", DRIVERS / "run_verl.py", **where(stage))
        try:
            yield Verl(stage, driver)
        finally:
            await driver.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(verl: Verl) -> list[dict[str, Any]]:
    return samples(await verl.trials("clean"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean_of_verl(verl: Verl) -> list[dict[str, Any]]:
    return await verl.of_verl("clean")


async def test_a_sample_is_the_trajectory_of_its_trial(clean: list[dict[str, Any]]):
    for sample in clean:
        length = len(sample["response_ids"])
        assert length == len(sample["mask"]) == len(sample["logprobs"]) == len(sample["scores"])
        assert {logprob < 0 for logprob, mask in zip(sample["logprobs"], sample["mask"], strict=True) if mask} == {True}
        assert {logprob for logprob, mask in zip(sample["logprobs"], sample["mask"], strict=True) if not mask} == {0.0}
        assert sample["scores"][:-1] == [0.0] * (length - 1)
        assert 0 < sample["scores"][-1] < 1
        assert (sample["turns"], sample["from"]["attempts"], sample["from"]["outcome"]) == (6, 1, "completed")
    assert clean[0]["response_ids"] != clean[1]["response_ids"], "siblings are samples of their own"


@pytest.mark.parametrize(
    ("prefix", "kind", "turn", "token"), [("killed", Kind.ENGINE_KILL, 2, 12), ("cut", Kind.CUT, 3, 0), ("actor", Kind.ACTOR_KILL, 3, 8)]
)
async def test_a_fault_of_the_infrastructure_changes_no_token(verl: Verl, clean: Any, prefix: str, kind: Kind, turn: int, token: int):
    fault = Fault(kind, f"{prefix}-u-0", turn, token)
    made = samples(await verl.trials(prefix, fault))
    assert fault.id in await verl.stage.fired()
    assert trained(made) == trained(clean)


async def test_an_agent_that_the_infrastructure_failed_goes_on_from_its_checkpoint(verl: Verl, clean: Any):
    said = await verl.trials("agent", fail=["infra", 3, 1])
    made = samples(said)
    assert trained(made) == trained(clean)
    assert said["calls"] | {"agent-u-0": 2, "agent-u-1": 2} == said["calls"]
    assert [(s["from"]["attempts"], s["from"]["turns_replayed"]) for s in made] == [(2, 2), (2, 2)], "no turn was generated again"


async def test_a_trial_whose_faults_do_not_end_is_an_exception_and_no_reward(verl: Verl):
    said = await verl.trials("lost", n=1, trial={"max_restarts": 1}, fail=["infra", 2, 9])
    assert (said["error"], "infra_exhausted" in said["words"], said["calls"]["lost-u-0"]) == ("TrialLost", True, 2)
    trial = await verl.stage.run.client.trial("lost-u-0")
    assert (trial["outcome"], trial["reward"]) == ("infra_exhausted", None)


async def test_an_agent_with_an_error_of_its_own_is_an_exception_as_well(verl: Verl):
    said = await verl.trials("bug", n=1, fail=["bug", 2, 9])
    assert (said["error"], "agent_failed" in said["words"]) == ("TrialLost", True)


async def test_a_trial_without_a_reward_is_left_for_verl_to_score(verl: Verl, clean: Any):
    made = samples(await verl.trials("unscored", unscored=True))
    assert [sample["scores"] for sample in made] == [None, None]
    assert [sample["response_ids"] for sample in made] == [sample["response_ids"] for sample in clean]


async def test_what_is_longer_than_verl_allows_is_cut_and_said(verl: Verl, clean: Any):
    [whole, _], [made] = clean, samples(await verl.trials("short", n=1, limits={"prompt_length": 100, "response_length": 50}))
    assert made["prompt_ids"] == whole["prompt_ids"][-100:]
    assert (made["response_ids"], made["logprobs"]) == (whole["response_ids"][:50], whole["logprobs"][:50])
    cut = (len(whole["prompt_ids"]) - 100, len(whole["response_ids"]) - 50)
    assert (made["from"]["prompt_tokens_cut"], made["from"]["response_tokens_cut"]) == cut


async def test_v0_takes_the_last_path_of_a_trial_and_says_how_many_there_are(verl: Verl, clean: Any):
    [made] = samples(await verl.trials("compact", n=1, compact=3))
    assert (made["from"]["paths"], made["from"]["path"], made["turns"]) == (2, 1, 2)
    assert made["scores"][-1] > 0


async def test_a_trial_that_ended_is_sampled_anew_when_its_step_is_repeated(verl: Verl, clean: Any):
    again = samples(await verl.trials("clean"))
    assert trained(again) == trained(clean), "verl was told to be deterministic"
    assert {sample["from"]["trial_id"] for sample in again} & {sample["from"]["trial_id"] for sample in clean} == set()


@pytest.mark.parametrize(
    ("prefix", "kind", "token"), [("killed", Kind.ENGINE_KILL, 30), ("cut", Kind.CUT, 0), ("actor", Kind.ACTOR_KILL, 30)]
)
async def test_loops_of_verl_do_not_see_their_servers_die(verl: Verl, clean_of_verl: Any, prefix: str, kind: Kind, token: int):
    fault = Fault(kind, f"{prefix}-det-1", 1, token)
    made = await verl.of_verl(prefix, fault)
    assert fault.id in await verl.stage.fired()
    assert trained(made) == trained(clean_of_verl)


async def test_a_process_keeps_as_many_conversations_as_it_is_told(verl: Verl):
    rows = [{"agent_name": "single_turn_agent", "priority": i, "raw_prompt": PROMPT} for i in range(3)]
    samples(await verl.ask(rows, limits={"response_length": 8}, client={"prefix": "kept", "max_sessions": 1}))
    states = sorted([(await verl.stage.run.client.trial(f"kept-det-{i}"))["state"] for i in range(3)])
    assert states == ["released", "released", "running"]


async def test_v1_trains_what_met_faults_as_what_did_not_and_refills_the_group_of_a_lost_trial(verl: Verl):
    def row(uid: str, **fields: Any) -> dict[str, Any]:
        return {"agent_name": "ours", "uid": uid, "index": 0, "raw_prompt": PROMPT, **fields}

    fault = Fault(Kind.ENGINE_KILL, "v1-faulty-1", 2, 12)
    await verl.stage.arm(fault)
    config = [f"{ROLLOUT}{name}={value}" for name, value in {**LIMITS, "n": 2}.items()]
    driver = await Driver.start("verl", DRIVERS / "run_verl_v1.py", **where(verl.stage))
    try:
        rows = [
            row("clean", fail=None, compact=3),
            row("faulty", fail=["infra", 3, 1], compact=3),
            row("lost", fail=["bug", 2, 9], compact=0),
        ]
        said = await driver.ask(
            {"rows": rows, "spare": [row("spare", fail=None, compact=0)], "batch_size": 3, "config": config, "loop": {"prefix": "v1"}}
        )
        assert driver.process.stdin is not None
        driver.process.stdin.close()
        await driver.process.wait()
    finally:
        await driver.aclose()
    assert fault.id in await verl.stage.fired()
    assert said["refilled"] == 1
    assert {key.split("_")[0] for key in said["samples"]} == {"clean", "faulty", "spare"}
    for sample in ("0_0", "0_1", "1_0", "1_1"):  # of each sibling both paths: its agent went on from a summary
        faulty, clean = (said["samples"][f"{uid}_{sample}"] for uid in ("faulty", "clean"))
        assert faulty == clean
        assert (faulty["tag"]["min_global_steps"], faulty["tag"]["status"]) == (7, "success")
