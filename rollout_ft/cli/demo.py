"""`rollout-ft demo`: the same trials and the same faults under three policies, and once without faults.

Owns the comparison and what is printed of it. Every figure is measured in this run: tokens generated are counted by
the engines themselves, in files that survive them.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rollout_ft import runtime
from rollout_ft.clock import monotonic
from rollout_ft.config import Config, TrialConfig
from rollout_ft.rayapi import ray
from rollout_ft.runtime import Run
from rollout_ft.telemetry.lines import Lines
from rollout_ft.testing.faults import Fault
from rollout_ft.testing.scenario import plan
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome, Recovery

AGENT = "rollout_ft.testing.quickstart_agent:run"
CLIENT_TIMEOUT_S = 2.0
LINE_EVERY_S = 5.0


@dataclass(slots=True)
class Policy:
    """One run of all tasks."""

    name: str
    trials: int
    finished: int = 0
    attempts: int = 0
    tokens_generated: int = 0
    tokens_wasted: int = 0
    seconds: float = 0.0
    results: list[TrialResult] = field(default_factory=list[TrialResult])
    trajectories: dict[str, JSON] = field(default_factory=dict[str, JSON])
    fired: int = 0

    @property
    def lost(self) -> int:
        return len(self.results) - self.finished

    def row(self) -> JSON:
        names = ("trials", "finished", "lost", "attempts", "tokens_generated", "tokens_wasted", "seconds")
        return {name: getattr(self, name) for name in names}


def settings(directory: str, seed: int, concurrency: int) -> Config:
    """The demo's config: three engines at a speed at which generations last long enough to be hit."""
    return Config.model_validate(
        {
            "run": "demo", "seed": seed, "ray": {"address": "local"},
            "engine": {
                "count": 3, "stream_interval_tokens": 4, "token_timeout_s": 1.5, "first_token_timeout_s": 6, "partial_flush_s": 0.25,
                "args": ["--tokens-per-s", "70", "--count-file", f"{directory}/{{engine}}.count"],
            },
            "fleet": {"kill_window_s": 5},
            "gateway": {"deadline_margin_s": 0.3},
            "session": {"grace_s": 20},
            "trial": {"concurrency": concurrency},
        }
    )  # fmt: skip


async def demo(tasks: Sequence[JSON], seed: int, console: Console, events: Path | None = None, concurrency: int = 16) -> JSON:
    """Runs everything; returns DESIGN section 7's object."""
    tasks = [{**task, "timeout_s": CLIENT_TIMEOUT_S, "max_tokens": 64} for task in tasks]
    with tempfile.TemporaryDirectory(prefix="rft-demo-") as directory:
        async with runtime.start(settings(directory, seed, concurrency), faults=True) as run:
            if events is not None:
                run.on_event = Lines(events).append
            stage = Stage(run, tasks, console, lambda: sampled(Path(directory)))
            policies = [await stage.play("no faults", Recovery.RESUME, [])]
            for recovery in Recovery:
                prefix = f"{recovery.value}-"
                policies.append(await stage.play(recovery.value, recovery, plan(tasks, seed, prefix)))
            stage.agent.close()
    same = identical(policies[0], policies[1], tasks)
    console.print(table(policies))
    for task_id, why in same.items():
        if why:
            console.print(f"[red]{task_id} differs: {why}")
    count = sum(not why for why in same.values())
    console.print(f"identical to the run without faults: {count} of {len(tasks)}")
    return {**{p.name: p.row() for p in policies}, "identical": count, "compared": len(tasks), "seed": seed}


class Stage:
    """One fleet, on which the policies play one after the other."""

    def __init__(self, run: Run, tasks: Sequence[JSON], console: Console, sampled: Callable[[], int] | None = None):
        """`sampled` tells the tokens of all engines by their own count; without, they are those that the turns account for."""
        self._run, self._tasks, self._console, self._sampled = run, tasks, console, sampled
        self.agent = ProcessAgent(AGENT)
        self._faults: Any = ray.get_actor(f"{run.config.run}/faults/1", run.setup.namespace)

    async def play(self, name: str, recovery: Recovery, faults: list[Fault]) -> Policy:
        await self._fleet_is_whole()
        policy = Policy(name, len(self._tasks))
        await self._faults.arm.remote(faults)
        killer = asyncio.create_task(self._kill_agents())
        before, began = self._sampled() if self._sampled else 0, monotonic()
        show = asyncio.create_task(self._show(policy, began))
        config = TrialConfig(recovery=recovery, concurrency=self._run.config.trial.concurrency)

        def done(result: TrialResult, trajectory: JSON) -> None:
            policy.results.append(result)
            policy.trajectories[result.task_id] = trajectory
            policy.finished += result.outcome == Outcome.COMPLETED
            policy.attempts += result.attempts

        try:
            prefix = f"{name.replace(' ', '-')}-"
            await self._run.run_trials(self._tasks, self.agent, prefix=prefix, on_result=done, config=config)
        finally:
            for task in (killer, show):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        policy.seconds = round(monotonic() - began, 1)
        counted = self._sampled() if self._sampled else sum(result.tokens_generated for result in policy.results)
        policy.tokens_generated = counted - before
        trained = sum(int(np.sum(p["loss_mask"])) for t in policy.trajectories.values() for p in t["paths"])
        policy.tokens_wasted = policy.tokens_generated - trained
        for result in policy.results:
            if recovery is Recovery.RESUME and result.outcome != Outcome.COMPLETED:
                self._console.print(f"{result.trial_id}: {result.outcome}: {result.cause}", highlight=False)
        fired = set(await self._faults.fired.remote())
        policy.fired = sum(fault.id in fired for fault in faults)
        self._console.print(f"{name}: {policy.finished} of {policy.trials} finished, {policy.fired} of {len(faults)} faults met")
        return policy

    async def _fleet_is_whole(self) -> None:
        while any(e["state"] != "healthy" for e in (await self._run.fleet())["engines"]):
            await asyncio.sleep(0.1)

    async def _kill_agents(self) -> None:
        while True:
            self.agent.kill(await self._faults.next_agent.remote())

    async def _show(self, policy: Policy, began: float) -> None:
        """A live line on a terminal, a line every few seconds elsewhere."""

        def line() -> str:
            done = f"{len(policy.results):3d} of {policy.trials} trials ended, {policy.finished} finished"
            return f"{policy.name:>10}: {done}, {monotonic() - began:5.1f} s"

        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(LINE_EVERY_S)
                self._console.print(line())
        with Live(line(), console=self._console, transient=True) as live:
            while True:
                await asyncio.sleep(0.2)
                live.update(line())


def sampled(directory: Path) -> int:
    """Tokens sampled by all engines so far, by their own count."""
    return sum(int(np.fromfile(path, "<u8")[0]) for path in directory.glob("*.count"))


def identical(clean: Policy, resumed: Policy, tasks: Sequence[JSON], within: float = 0) -> dict[str, str]:
    """Per task: empty when token ids, loss mask, reward and logprobs (`within` this) are equal, else what differs first."""
    rewards = {(p.name, r.task_id): r.reward for p in (clean, resumed) for r in p.results}
    found: dict[str, str] = {}
    for task in tasks:
        key = str(task["task_id"])
        a, b = clean.trajectories[key]["paths"], resumed.trajectories[key]["paths"]
        found[key] = "" if len(a) == len(b) else f"{len(b)} paths instead of {len(a)}"
        for one, other in zip(a, b, strict=False):
            for name in ("token_ids", "loss_mask"):
                if one[name] != other[name]:
                    found[key] = found[key] or name
            if not found[key] and not np.allclose(one["logprobs"], other["logprobs"], rtol=0, atol=within):
                found[key] = "logprobs"
        if rewards["no faults", key] != rewards[resumed.name, key]:
            found[key] = found[key] or "reward"
    return found


def table(policies: Sequence[Policy]) -> Table:
    made = Table(title="trials and tokens, by trial.recovery", box=box.SIMPLE)
    for column in ("recovery", "finished", "lost", "attempts", "generated", "wasted", "seconds"):
        made.add_column(column, justify="left" if column == "recovery" else "right", no_wrap=True)
    for p in policies:
        made.add_row(
            p.name, f"{p.finished} of {p.trials}", str(p.lost), str(p.attempts), f"{p.tokens_generated:,}",
            f"{p.tokens_wasted:,}", f"{p.seconds:.1f}",
        )  # fmt: skip
    return made


def failed(result: JSON) -> bool:
    """Whether the demo did not show what it is there to show."""
    return bool(result["resume"]["lost"]) or result["identical"] != result["compared"]
