"""verifiers' own environment, agent, harness, interception and runtime: asked for tasks, it says what became of each episode."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import tides
from verifiers.v1.clients import EvalClientConfig, ModelContext
from verifiers.v1.types import Sampling
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

CONFIG = {
    "taskset": {"id": "tides"},
    "agent": {"harness": {"id": "tides"}, "runtime": {"type": "subprocess"}},
    "interception": {"type": "server"},
}


async def played(asked: dict[str, Any]) -> list[dict[str, Any]]:
    tides.rows[:] = asked["rows"]
    tides.settings.update(prefix=asked["prefix"], trial=asked.get("trial") or {})
    env = load_environment(resolve_env_config(CONFIG))
    ctx = ModelContext(model="default", client=EvalClientConfig(base_url="http://127.0.0.1:9/v1"), sampling=Sampling(temperature=1.0))
    async with env.serving():
        slots = [slot for task in env.taskset for slot in env.slots(task)]
        episodes = await asyncio.gather(*(env.run_slot(slot, ctx) for slot in slots))
    return [said_of(episode) for episode in episodes]


def said_of(episode: Any) -> dict[str, Any]:
    traces = [
        {
            "reward": trace.reward, "metrics": trace.metrics,
            "branches": [
                {"token_ids": branch.token_ids, "mask": branch.sampled_mask, "logprobs": branch.logprobs,
                 "said": [str(node.message.content) for node in branch.nodes]}
                for branch in trace.branches
            ],
        }
        for trace in episode.traces
    ]  # fmt: skip
    return {"ok": episode.ok, "errors": [[error.type, error.message[:300]] for error in episode.errors], "traces": traces}


def main() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    for line in sys.stdin:
        try:
            said: dict[str, Any] = {"episodes": loop.run_until_complete(played(json.loads(line)))}
        except Exception as e:
            said = {"error": type(e).__name__, "words": str(e)}
        print(json.dumps({**said, "launched": dict(tides.launched)}), flush=True)


if __name__ == "__main__":
    main()
