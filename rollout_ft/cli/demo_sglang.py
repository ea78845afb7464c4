"""`rollout-ft demo-sglang`: a few trials on real SGLang engines, without a GPU, while one of the engines is killed.

Owns the scene: SmolLM2 with its own chat template at temperature 0, and which trial meets the fault. The rest is the
demo's. Engines compute the same tokens in a batch and alone but for the last bits, so logprobs are compared within 0.001.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rollout_ft import runtime
from rollout_ft.cli.demo import Policy, Stage, identical, table
from rollout_ft.config import Config
from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.testing.sglang_cpu import CPU_ARGS, launch_command
from rollout_ft.types import JSON, Outcome, Recovery

TOPICS = ("tides", "moss", "lanterns", "maps", "bridges", "salt")
TURNS = 3
MAX_TOKENS = 48
WITHIN = 1e-3


def tasks() -> list[JSON]:
    prompts = [f"Tell me about {topic} in one or two sentences." for topic in TOPICS]
    return [
        {"task_id": topic, "prompt": prompt, "turns": TURNS, "max_tokens": MAX_TOKENS, "timeout_s": 600.0, "seed": i, "no_tools": True}
        for i, (topic, prompt) in enumerate(zip(TOPICS, prompts, strict=True))
    ]


def settings(python: Path, model: Path, engines: int) -> Config:
    return Config.model_validate(
        {
            "run": "demo-sglang", "ray": {"address": "local"},
            "model": {"path": str(model.resolve()), "context_tokens": 2048, "tool_parser": "none"},
            "engine": {
                "kind": "sglang", "count": engines, "command": launch_command(str(python.absolute())), "args": list(CPU_ARGS),
                "env": {"OMP_NUM_THREADS": "1"}, "start_timeout_s": 600, "first_token_timeout_s": 300, "token_timeout_s": 120,
                "stream_interval_tokens": 4, "partial_flush_s": 0.25,
            },
            "session": {"max_output_tokens": 256},
            "sampling": {"parameters": {"temperature": 0}},
            "trial": {"concurrency": len(TOPICS)},
        }
    )  # fmt: skip


async def demo(python: Path, model: Path, engines: int, console: Console) -> JSON:
    """Plays the trials without a fault and with one; returns what `rollout-ft demo --json` does, of two policies."""
    todo = tasks()
    console.print(f"{engines} engines start: sglang.launch_server on this CPU, {model.name}")
    async with runtime.start(settings(python, model, engines), faults=True) as run:
        stage = Stage(run, todo, console)
        policies = [await stage.play("no faults", Recovery.RESUME, []), await stage.play("resume", Recovery.RESUME, planned("resume-"))]
        stage.agent.close()
    same = identical(policies[0], policies[1], todo, WITHIN)
    same |= {result.task_id: "outcomes" for policy in policies for result in policy.results if result.outcome != Outcome.COMPLETED}
    console.print(table(policies))
    count = sum(not why for why in same.values())
    for line in _told(policies, same):
        console.print(line, highlight=False)
    return {**{p.name: p.row() for p in policies}, "identical": count, "compared": len(todo), "faults": policies[1].fired}


def planned(prefix: str) -> list[Fault]:
    """An engine is killed, with kill -9, in the middle of the second turn of one of its trials."""
    return [Fault(Kind.ENGINE_KILL, prefix + TOPICS[2], turn=2, token=MAX_TOKENS // 4)]


def _told(policies: Sequence[Policy], same: dict[str, str]) -> list[str]:
    resumed = policies[1]
    survived = sum(result.faults_survived > 0 for result in resumed.results)
    reused = sum(result.tokens_reused for result in resumed.results)
    lines = [f"an engine was killed in mid-generation: {survived} trials met it, {reused} sampled tokens were gone on from"]
    lines += [f"[yellow]{task}: {why} differ" for task, why in same.items() if why]
    return [*lines, f"the same tokens as without the fault: {sum(not why for why in same.values())} of {len(same)}"]


def failed(result: JSON) -> bool:
    return bool(result["resume"]["lost"]) or result["faults"] != 1
