"""SkyRL's own trainer on a CPU, up to the advantages: asked for prompts, it says what it would train on.

Each prompt is a row of a dataset (`uid`, `prompt`, `env_extras`), `config` are values of SkyRL's generator config. Real are its
config, input, checks, filters, tensors and advantages; only the workers that would hold a model on GPUs are not there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import typing
from pathlib import Path
from typing import Any

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict  # SkyRL's pydantic models take the other one from Python 3.12 on

import tool_agent  # noqa: E402
from skyrl.backends.skyrl_train.inference_servers.engine_utils import get_sampling_params_for_backend  # noqa: E402
from skyrl.train.config import SkyRLTrainConfig  # noqa: E402
from skyrl.train.generators.utils import concatenate_generator_outputs, prepare_generator_input  # noqa: E402
from skyrl.train.trainer import RayPPOTrainer  # noqa: E402
from skyrl.utils.tok import get_tokenizer  # noqa: E402

from rollout_ft.integrations.skyrl import TrialGenerator  # noqa: E402

MODEL = Path(__file__).parents[3] / "rollout_ft/testing/small_engine/model"


class NoWorkers:
    """What the trainer asks of its workers before it trains."""

    def get_lcm_dp_size(self) -> int:
        return 1


def trainer_of(asked: dict[str, Any], tokenizer: Any) -> Any:
    cfg = SkyRLTrainConfig()
    cfg.trainer.policy.model.path = str(MODEL)
    cfg.trainer.train_batch_size = cfg.trainer.policy_mini_batch_size = len(asked["prompts"])
    cfg.trainer.algorithm.advantage_estimator = "grpo"
    cfg.generator.n_samples_per_prompt = 2
    cfg.generator.max_input_length = 512
    cfg.trainer.enable_ray_gpu_monitor = cfg.generator.inference_engine.enable_ray_prometheus_stats = False
    for name, value in asked.get("config", {}).items():
        setattr(cfg.generator, name, value)
    cfg.generator.sampling_params.max_generate_length = asked.get("max_generate_length", 512)
    key, trial = asked.get("operator_key", ""), asked.get("trial")
    generator = TrialGenerator(cfg.generator, tool_agent.run, operator_key=key, prefix=asked["prefix"], trial=trial)
    trainer = RayPPOTrainer(cfg, None, tokenizer, None, None, generator)
    trainer.dispatch = NoWorkers()
    trainer.global_step = asked.get("step", 1)
    return trainer


async def trained_on(asked: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    trainer = trainer_of(asked, tokenizer)
    cfg = trainer.cfg.generator
    params = get_sampling_params_for_backend("vllm", cfg.sampling_params)
    batch, uids = prepare_generator_input(asked["prompts"], cfg.n_samples_per_prompt, params, "tools", "train", trainer.global_step)
    output = await trainer.generate(batch)
    names = [f"{each.instance_id}_{each.repetition_id}" for each in output["trajectory_ids"]]
    if cfg.step_wise_trajectories:
        uids = [each.instance_id for each in output["trajectory_ids"]]
    said = {
        name: output[name]
        for name in ("prompt_token_ids", "response_ids", "loss_masks", "rollout_logprobs", "stop_reasons", "is_last_step")
    }
    said |= {"names": names, "rewards": list(output["rewards"]), "metrics": dict(trainer.all_metrics)}
    concatenate_generator_outputs([{**output, "rollout_metrics": {}}], cfg.step_wise_trajectories)
    output, uids = trainer.postprocess_generator_output(output, uids)
    inputs = trainer.convert_to_training_input(output, uids)
    inputs["values"] = None  # there is no critic
    inputs = trainer.compute_advantages_and_returns(inputs)
    said["advantages"] = [row[mask.bool()].tolist() for row, mask in zip(inputs["advantages"], inputs["response_mask"], strict=True)]
    return said


def main() -> None:
    tokenizer, loop = get_tokenizer(str(MODEL), padding_side="left"), asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    for line in sys.stdin:
        try:
            said = loop.run_until_complete(trained_on(json.loads(line), tokenizer))
        except Exception as e:
            said = {"error": type(e).__name__, "words": str(e)}
        print(json.dumps({**said, "calls": dict(tool_agent.calls)}), flush=True)


if __name__ == "__main__":
    main()
