"""verl's V1 rollout on a CPU: its own manager, workers, TransferQueue and replay buffer, in a Ray of their own.

Asked once, as `run_verl.py` is, for `batch_size` prompts. `spare` are the rows that its replay buffer gets when it has
evicted a prompt and asks for others. Says which samples were taken for training, and how many prompts were refilled.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
import run_verl
import torch
import transfer_queue as tq
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

from rollout_ft.integrations.verl import SurvivingAgentLoopManagerTQ

STEP = 7
SMALL = [
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "transfer_queue.enable=true",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "transfer_queue.backend.SimpleStorage.total_storage_size=1000",
]
FIELDS = {
    "prompts": "prompt_ids",
    "responses": "response_ids",
    "response_mask": "mask",
    "rollout_log_probs": "logprobs",
    "rm_scores": "scores",
}


class NoServers:
    """What the client of verl has of servers: here there are none."""

    _load_balancer = None


class Trainer:
    """As much of verl's trainer as asks for samples and takes them."""

    def __init__(self, manager: Any, spare: list[dict[str, Any]]):
        self.manager, self.spare, self.refilled = manager, spare, 0
        self.buffer = ReplayBufferAsync("colocate_async", None, None, "drop", None, poll_interval=0.2, refill_fn=self.refill)

    def refill(self, count: int) -> None:
        self.refilled += count
        self.ask(self.spare[:count])
        self.spare = self.spare[count:]

    def ask(self, rows: list[dict[str, Any]]) -> None:
        waiting = [{"is_prompt": True, "status": "pending", "global_steps": STEP} for _ in rows]
        tq.kv_batch_put(keys=[row["uid"] for row in rows], partition_id="train", tags=waiting)
        columns = {name: NonTensorStack(*[NonTensorData(row.get(name)) for row in rows]) for row in rows for name in row if name != "index"}
        batch = TensorDict({**columns, "index": torch.tensor([row["index"] for row in rows])}, batch_size=len(rows))
        batch["global_steps"] = NonTensorData(STEP)
        self.manager.generate_sequences(batch)

    def taken(self, prompts: int) -> dict[str, Any]:
        meta, _ = self.buffer.sample(STEP, "train", prompts)
        samples: dict[str, Any] = {}
        for key, tag in zip(meta.keys, meta.tags, strict=True):
            found = tq.kv_batch_get([key], "train", select_fields=list(FIELDS))
            samples[key] = {ours: found[theirs][0].tolist() for theirs, ours in FIELDS.items()} | {"tag": tag}
        return samples


def main() -> None:
    env = {name: os.environ[name] for name in ("ROLLOUT_FT_GATEWAY_URL", "ROLLOUT_FT_OPERATOR_KEY")}
    here = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])
    ray.init(address="local", num_cpus=8, include_dashboard=False, runtime_env={"env_vars": {**env, "PYTHONPATH": here}})
    try:
        asked = json.loads(sys.stdin.readline())
        config = run_verl.config_of({**asked, "config": [*SMALL, *asked["config"]]})
        tq.init(config.transfer_queue)
        trainer = Trainer(SurvivingAgentLoopManagerTQ.create(config=config, llm_client=NoServers()), asked["spare"])
        trainer.ask(asked["rows"])
        samples = trainer.taken(asked["batch_size"])
        print(json.dumps({"samples": samples, "refilled": trainer.refilled}), flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
