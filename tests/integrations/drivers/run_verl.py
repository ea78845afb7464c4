"""verl's own AgentLoopWorker, agent loops and config on a CPU: asked which loop and which rows, it says the batch.

Each row of `rows` is a row of a dataset, `config` are overrides of verl's own, `loop` is what is said of ours in verl's
`agent_loop_config_path`, `client` are arguments of our client, which serves verl's own loops.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tool_agent
import verl
import yaml
from hydra import compose, initialize_config_dir
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.protocol import DataProto

from rollout_ft.integrations.verl import SurvivingLLMClient, TrialAgentLoop

MODEL = Path(__file__).parents[3] / "rollout_ft/testing/small_engine/model"
SMALL = [f"actor_rollout_ref.model.path={MODEL}", "actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.mode=async"]


def config_of(asked: dict[str, Any]) -> Any:
    loops = [{"name": "ours", "_target_": f"{TrialAgentLoop.__module__}.{TrialAgentLoop.__qualname__}", "agent": "tool_agent:run"}]
    path = Path(tempfile.gettempdir()) / f"loops-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump([loops[0] | asked.get("loop", {})]))
    overrides = [f"actor_rollout_ref.rollout.agent.agent_loop_config_path={path}", *asked.get("config", ())]
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return compose("ppo_trainer", [*SMALL, *overrides])


def batch_of(rows: list[dict[str, Any]]) -> DataProto:
    names = {name for row in rows for name in row}
    columns = {name: np.empty(len(rows), dtype=object) for name in names}
    for name, column in columns.items():
        column[:] = [row.get(name) for row in rows]
    return DataProto.from_dict(non_tensors=columns, meta_info={"global_steps": 7})


async def generated(asked: dict[str, Any]) -> list[dict[str, Any]]:
    config = config_of(asked)
    worker = AgentLoopWorker(config, SurvivingLLMClient(config, None, **asked.get("client", {})))
    return samples_of(await worker.generate_sequences(batch_of(asked["rows"])))


def samples_of(batch: DataProto) -> list[dict[str, Any]]:
    """Each sample without its padding."""
    made: list[dict[str, Any]] = []
    width = batch.batch["prompts"].shape[1]
    for i in range(len(batch)):
        here = {name: tensor[i] for name, tensor in batch.batch.items()}
        attended = here["attention_mask"].bool()
        of_prompt, of_response = attended[:width], attended[width:]
        sample: dict[str, Any] = {
            "prompt_ids": here["prompts"][of_prompt].tolist(), "response_ids": here["responses"][of_response].tolist(),
            "mask": here["response_mask"][of_response].tolist(), "scores": None, "logprobs": None,
            "turns": int(batch.non_tensor_batch["__num_turns__"][i]), "from": batch.non_tensor_batch.get("rollout_ft", {i: None})[i],
            "steps": [batch.non_tensor_batch[f"{end}_global_steps"][i] for end in ("min", "max")],
        }  # fmt: skip
        if "rm_scores" in here:
            sample["scores"] = here["rm_scores"][of_response].tolist()
        if "rollout_log_probs" in here:
            sample["logprobs"] = here["rollout_log_probs"][of_response].tolist()
        made.append(sample)
    return made


def main() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    for line in sys.stdin:
        try:
            said: dict[str, Any] = {"samples": loop.run_until_complete(generated(json.loads(line)))}
        except Exception as e:
            said = {"error": type(e).__name__, "words": str(e)}
        print(json.dumps({**said, "calls": dict(tool_agent.calls)}), flush=True)


if __name__ == "__main__":
    main()
