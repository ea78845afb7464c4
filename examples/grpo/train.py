"""GRPO that does not notice its faults: rollouts on a fleet that is broken in every step, and the loss of an unbroken one.

    python examples/grpo/train.py             # 30 steps, an engine, an agent and a connection lost in each
    python examples/grpo/train.py --compare   # once with faults and once without: is every loss the same, to the bit?

A step publishes the weights, plays groups of siblings, and learns from their token-exact rows. What is random follows from a
seed that each trial has from the step and its place in it, and rows are in the order of their trials' ids: nothing depends on
what came first, or on what went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import rollout_ft
from examples.grpo import game
from examples.grpo.faults import Trouble, plan, trouble
from examples.grpo.policy import Policy
from rollout_ft.samples.rows import rows_of
from rollout_ft.testing.faults import Fault

CONFIG = Path(__file__).with_name("config.yaml")
AGENT = "examples.grpo.game:play"


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 30
    groups: int = 4
    siblings: int = 8
    turns: int = 2
    max_tokens: int = 16
    epochs: int = 4
    learning_rate: float = 0.01
    clip: float = 0.2
    seed: str = "grpo"


@dataclass(frozen=True, slots=True)
class Step:
    """A line of the table. `drift`: how far apart the sampler's and the trainer's logprobs of the same tokens were, at most."""

    number: int
    reward: float
    loss: float
    version: str
    restarts: int
    lost: int
    drift: float
    met: list[Fault]
    seconds: float


def tasks_of(name: str, step: int, settings: Settings) -> list[dict[str, Any]]:
    """The step's trials: siblings have one group and one sequence of letters, and each a seed that is the same in every run."""
    tasks: list[dict[str, Any]] = []
    for g in range(settings.groups):
        letters = game.letters(f"{settings.seed}/{step}/{g}", settings.turns)
        for i in range(settings.siblings):
            group, seed = f"{name}-{step:03d}-{g}", random.Random(f"{settings.seed}/{step}/{g}/{i}").getrandbits(62)
            task = {"task_id": f"{group}-{i}", "group_id": group, "seed": seed}
            tasks.append({**task, "letters": letters, "max_tokens": settings.max_tokens})
    return tasks


async def publish(fleet: rollout_ft.Fleet, policy: Policy, version: str, directory: Path) -> None:
    """New weights for every engine, and for each that is started again later."""
    (directory / version).mkdir()
    save_file(policy.state_dict(), directory / version / "model.safetensors")
    async with fleet.paused("in_place"):
        await fleet.update(version, path=str(directory / version))


async def rollout(run: rollout_ft.Run, agent: rollout_ft.ProcessAgent, tasks: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """All trials to their outcome; their results, and their rows by trial."""
    rows: list[Any] = []

    def collect(result: rollout_ft.TrialResult, trajectory: dict[str, Any]) -> None:
        rows.extend(rows_of(trajectory, result.reward, result.outcome))

    results = await run.run_trials(tasks, agent, on_result=collect, release=True)
    return results, sorted(rows, key=lambda row: (row["trial_id"], row["path"]))


def advantages(rewards: Mapping[str, float | None]) -> dict[str, float]:
    """How much better than its siblings each trial of a group did. A trial without a reward was lost: that is not a reward of
    0, so it has no advantage, and the others' baseline knows nothing of it."""
    known = {trial: reward for trial, reward in rewards.items() if reward is not None}
    if not known:
        return {}
    mean, spread = fmean(known.values()), pstdev(known.values())
    return {trial: (reward - mean) / (spread + 1e-3) for trial, reward in known.items()}


def batch(rows: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, and for each but the first its mask, the sampler's logprob and its trial's advantage."""
    groups: dict[str, dict[str, float | None]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], {})[row["trial_id"]] = row["reward"]
    better = {trial: value for rewards in groups.values() for trial, value in advantages(rewards).items()}
    rows = [row for row in rows if row["trial_id"] in better]

    def padded(name: str) -> Tensor:
        """What a row has for its response, behind as many zeros as its prompt has tokens."""
        columns = [np.concatenate([np.zeros(len(row["prompt_ids"])), row[name]]) for row in rows]
        return pad_sequence([torch.tensor(column, dtype=torch.float32) for column in columns], batch_first=True)[:, 1:]

    ids = [torch.tensor(np.concatenate([row["prompt_ids"], row["response_ids"]]), dtype=torch.long) for row in rows]
    advantage = torch.tensor([[better[row["trial_id"]]] for row in rows])
    return pad_sequence(ids, batch_first=True), padded("loss_mask"), padded("rollout_log_probs"), advantage


def learn(policy: Policy, optimizer: torch.optim.Optimizer, rows: Sequence[Any], settings: Settings) -> tuple[float, float]:
    """A few gradient steps on one batch: the loss of the last, and the drift before the first."""
    ids, mask, sampled, advantage = batch(rows)
    losses, drift = list[float](), 0.0
    for _ in range(settings.epochs):
        apart = (policy.logprobs(ids) - sampled).where(mask > 0, 0)
        drift = drift if losses else apart.abs().max().item()
        ratio = apart.exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantage)
        loss = -(gain * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[-1], drift


async def train(
    run: rollout_ft.Run, agent: rollout_ft.ProcessAgent, planned: Trouble, settings: Settings, faulty: bool, directory: Path
) -> list[Step]:
    policy, fleet, name, steps = Policy(settings.seed), rollout_ft.Fleet(run.client), "faults" if faulty else "clean", list[Step]()
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    for number in range(settings.steps):
        began, version, tasks = time.monotonic(), f"{name}-{number:03d}", tasks_of(name, number, settings)
        faults = plan(f"{settings.seed}/{number}", tasks) if faulty else []
        await planned.arm(faults)
        await publish(fleet, policy, version, directory)
        results, rows = await rollout(run, agent, tasks)
        assert {v for row in rows for v in row["weight_versions"]} == {version}, "tokens of other weights"
        loss, drift = learn(policy, optimizer, rows, settings)
        rewards = [result.reward for result in results if result.reward is not None]
        restarts, lost = sum(result.attempts - 1 for result in results), len(results) - len(rewards)
        met, seconds = await planned.met(faults), time.monotonic() - began
        steps.append(Step(number, fmean(rewards), loss, version, restarts, lost, drift, met, seconds))
        show(steps[-1])
    return steps


async def plays(settings: Settings, faulty: Sequence[bool], overrides: list[str]) -> list[list[Step]]:
    """The same training as often as asked, with faults and without, on one fleet."""
    torch.set_num_threads(1)
    played: list[list[Step]] = []
    with tempfile.TemporaryDirectory(prefix="grpo-") as directory, closing(rollout_ft.ProcessAgent(AGENT)) as agent:
        async with rollout_ft.start(CONFIG, overrides, faults=True) as run, trouble(run, agent) as planned:
            for each in faulty:
                print(f"\n{'with faults' if each else 'without faults'}, seed {settings.seed}\n{HEAD}", flush=True)
                played.append(await train(run, agent, planned, settings, each, Path(directory)))
                summarize(played[-1])
    return played


HEAD = "step  mean reward       loss  version     restarts  lost  seconds  faults met (kind:group-sibling/turn/token)"


def show(step: Step) -> None:
    met = " ".join(f"{fault.kind}:{fault.trial_id.split('-', 2)[2]}/{fault.turn}/{fault.token}" for fault in step.met)
    line = f"{step.number:4d}  {step.reward:11.3f}  {step.loss:9.6f}  {step.version:10}  {step.restarts:8d}  {step.lost:4d}"
    print(f"{line}  {step.seconds:7.1f}  {met}".rstrip(), flush=True)


def summarize(steps: Sequence[Step]) -> None:
    seconds, faults, drift = sum(step.seconds for step in steps), sum(len(step.met) for step in steps), max(step.drift for step in steps)
    print(f"{seconds:.0f} s, {faults} faults; logprobs of the sampler and of the trainer are at most {drift:.1e} apart", flush=True)


def main() -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", default=defaults.seed)
    parser.add_argument("--no-faults", action="store_true", help="nothing is broken")
    parser.add_argument("--compare", action="store_true", help="with faults, then without; exit code 1 when a loss differs")
    parser.add_argument("overrides", nargs="*", help="keys of the config, as engine.count=2")
    options = parser.parse_args()
    settings = Settings(steps=options.steps, seed=options.seed)
    faulty = [True, False] if options.compare else [not options.no_faults]
    played = asyncio.run(plays(settings, faulty, options.overrides))
    if not options.compare:
        return 0
    same = sum((a.loss, a.reward) == (b.loss, b.reward) for a, b in zip(*played, strict=True))
    print(f"\nidentical: {same} of {settings.steps} steps")
    return int(same != settings.steps)


if __name__ == "__main__":
    sys.exit(main())
