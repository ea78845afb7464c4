"""All engines freeze at once: what they share is at fault, one of them is replaced, and the others lose nothing when they wake."""

from __future__ import annotations

import asyncio
import signal

import psutil
import pytest
from ray_run import marked_engines, staged

from rollout_ft.clock import wall
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

TASKS = [{"task_id": f"t{i}", "prompt": "Explain tides.", "turns": 4, "seed": i, "timeout_s": 90.0, "max_tokens": 64} for i in range(6)]
CONFIG = [
    "engine.count=3",
    "engine.args=[--tokens-per-s,'40',--model,hash]",
    "engine.first_token_timeout_s=2",
    "engine.compile_timeout_s=10",
    "fleet.kill_window_s=120",
    "fleet.max_kills_share=0.4",
    "fleet.ping_s=5",
    "gateway.ping_s=5",
]
KEYS = ("token_ids", "loss_mask", "logprobs", "version_spans")


async def test_one_is_replaced_and_the_others_go_on_where_they_were():
    async with staged(*CONFIG) as stage:
        paths: dict[str, JSON] = {}

        async def play(prefix: str) -> None:
            def keep(result: TrialResult, trajectory: JSON) -> None:
                paths[result.trial_id] = [[p[k] for k in KEYS] for p in trajectory["paths"]]

            results = await stage.run.run_trials(TASKS, stage.agent, concurrency=6, prefix=prefix, on_result=keep)
            assert [(r.outcome, r.attempts, r.tokens_wasted) for r in results] == [("completed", 1, 0)] * 6

        def events(name: str) -> list[JSON]:
            return [e for e in stage.events if e["event"] == name and e["time"] >= since]

        async def at_work() -> bool:
            """Whether every trial has been answered once."""
            trials = await stage.run.client.get("/trials")
            return sum(t["trial_id"].startswith("frozen-") and t["entries"] >= 2 for t in trials) == len(TASKS)

        since = wall()
        await play("clean-")
        since, engines = wall(), marked_engines()
        assert len(engines) == 3
        playing = asyncio.create_task(play("frozen-"))
        while not await at_work():
            await asyncio.sleep(0.05)
        for process in engines:
            process.send_signal(signal.SIGSTOP)
        while len(events("engine.spared")) < 2:
            assert not playing.done()
            await asyncio.sleep(0.05)
        assert "fleet.max_kills_share" in events("engine.spared")[0]["remedy"]
        states = sorted(e["state"] for e in (await stage.run.fleet())["engines"])
        assert states.count("suspect") == 2
        for process in engines:
            if process.is_running() and process.status() == psutil.STATUS_STOPPED:
                process.send_signal(signal.SIGCONT)
        await playing
        await stage.whole()
        assert len(events("engine.dead")) == 1
        assert len(events("engine.spared")) == 2
        assert all(paths[f"frozen-{t['task_id']}"] == paths[f"clean-{t['task_id']}"] for t in TASKS)
