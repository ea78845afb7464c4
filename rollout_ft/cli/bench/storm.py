"""`rollout-ft bench storm`: a run of many trials on many engines, with the faults that lose a tenth of such runs.

Owns the load, the plan of its faults, and the figures (DESIGN section 7). What is real: gateway, sessions, drivers,
stores, the rules of the fleet, clients over HTTP, and engines, which are processes that are killed and stopped. What is
not: Ray (all of ours is one process, see `testing.local_run`), the engines' model (tokens are a hash, at a fixed pace for
each request and so many at once), the router (its clients hang up and take it for a 504), and time, which is `scale` times
faster: 85 minutes are two. Every fault happens once; a policy that starts anew does not meet it twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from rollout_ft.cli.bench.machine import machine
from rollout_ft.clock import monotonic
from rollout_ft.config import Config, TrialConfig
from rollout_ft.testing.impatient import Impatient, Patience
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome, Recovery

TOKENS_PER_S = 40.0
"""Of one request, in seconds of the fast day."""
HIT = 127 / 500
"""Of the trials, how many have a turn that the router loses."""
KILLED, FROZEN = 4, 3


@dataclass(frozen=True, slots=True)
class Scale:
    trials: int = 500
    engines: int = 33
    running: int = 8
    """Requests that one engine runs at once."""
    scale: float = 40.0
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Plan:
    """`slow`: (task, turn) whose reply takes longer than the router waits; `blows`: when, to which engine, what."""

    tasks: list[JSON]
    slow: list[tuple[str, int]]
    blows: list[tuple[float, str, signal.Signals]]


def plan(scale: Scale) -> Plan:
    """The same for every policy. Long turns are long without faults as well; then nobody loses their replies."""
    rng = random.Random(scale.seed)
    tasks = [_task(rng, f"task-{i}") for i in range(scale.trials)]
    slow: list[tuple[str, int]] = []
    for task in rng.sample(tasks, round(HIT * scale.trials)):
        turn = rng.randrange(len(task["tokens"]))
        task["tokens"][turn] = round(rng.uniform(1.1, 1.6) * Patience(scale.scale).router_s / scale.scale * TOKENS_PER_S)
        slow.append((task["task_id"], turn))
    struck = rng.sample(range(scale.engines), min(scale.engines // 2, KILLED + FROZEN))
    kinds = [signal.SIGKILL] * KILLED + [signal.SIGSTOP] * FROZEN
    blows = [(rng.uniform(8, 45) * 60 / scale.scale, f"engine-{i}", kind) for i, kind in zip(struck, kinds, strict=False)]
    return Plan(tasks, slow, sorted(blows))


def _task(rng: random.Random, task_id: str) -> JSON:
    turns = rng.randint(3, 10)
    return {
        "task_id": task_id, "tokens": [rng.randint(32, 160) for _ in range(turns)], "tools_s": [rng.uniform(6, 90) for _ in range(turns)],
    }  # fmt: skip


def settings(scale: Scale, directory: str) -> Config:
    """Every deadline of the product at the fast day's speed: detection takes as long as a few tokens."""
    return Config.model_validate(
        {
            "run": "storm", "seed": scale.seed,
            "engine": {
                "count": scale.engines, "stream_interval_tokens": 16, "token_timeout_s": 3, "first_token_timeout_s": 15,
                "partial_flush_s": 0.5, "admission": {"first_token_target_s": 1},
                "args": [
                    "--model", "hash", "--tokens-per-s", f"{TOKENS_PER_S:g}", "--max-running-requests", str(scale.running),
                    "--count-file", f"{directory}/{{engine}}.count",
                ],
            },
            "gateway": {"deadline_margin_s": 2},
            "session": {"grace_s": 20},
        }
    )  # fmt: skip


@dataclass(slots=True)
class Played:
    """One run of all trials."""

    name: str
    seconds: float = 0.0
    generated: int = 0
    useful: int = 0
    attempts: int = 0
    faults: int = 0
    statuses: dict[int, int] = field(default_factory=dict[int, int])
    results: list[TrialResult] = field(default_factory=list[TrialResult])

    @property
    def lost(self) -> int:
        return sum(r.outcome != Outcome.COMPLETED for r in self.results)

    def row(self, calm: Played) -> JSON:
        """DESIGN section 7's keys, and what was met."""
        return {
            "trials": len(self.results), "trials_lost": self.lost, "tokens_generated": self.generated,
            "tokens_useful_share": round(self.useful / max(1, self.generated), 4), "seconds": round(self.seconds, 1),
            "seconds_ratio": round(self.seconds / calm.seconds, 3), "attempts": self.attempts, "faults_met": self.faults,
        }  # fmt: skip


async def bench(scale: Scale, console: Console, policies: Sequence[Recovery] = tuple(Recovery)) -> JSON:
    """Once without faults, then each policy with them; prints the table, returns the object."""
    facts, planned = machine(), plan(scale)
    calm = await play("no faults", scale, Plan(planned.tasks, [], []), Recovery.RESUME, console)
    played = [await play(policy.value, scale, planned, policy, console) for policy in policies]
    console.print(table([calm, *played], calm))
    return {**{p.name: p.row(calm) for p in (calm, *played)}, "machine": facts, "load_after": round(os.getloadavg()[0], 1)}


async def play(name: str, scale: Scale, planned: Plan, recovery: Recovery, console: Console, at_once: int | None = None) -> Played:
    """All trials on a run of its own, `at_once` (or half of them) at the same time."""
    played = Played(name)
    with tempfile.TemporaryDirectory(prefix="rft-storm-") as directory:
        async with local_run(settings(scale, directory)) as run:
            load = Impatient(Patience(scale.scale), planned.slow, scale.seed)

            def done(result: TrialResult, trajectory: JSON) -> None:
                played.results.append(result)
                played.attempts += result.attempts
                if result.outcome == Outcome.COMPLETED:
                    played.useful += sum(int(np.sum(path["loss_mask"])) for path in trajectory["paths"])

            config, began = TrialConfig(recovery=recovery, concurrency=at_once or scale.trials // 2), monotonic()
            striking = asyncio.create_task(_strike(run, planned, played))
            try:
                await run.run_trials(planned.tasks, load.play, prefix="", config=config, on_result=done)
            finally:
                striking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await striking
                await load.aclose()
            played.seconds = monotonic() - began
        played.generated = sum(int(np.fromfile(path, "<u8")[0]) for path in Path(directory).glob("*.count"))
    played.faults += len(load.seen.lost)
    played.statuses = load.seen.statuses
    done_of = f"{len(played.results) - played.lost} of {len(played.results)} trials"
    console.print(
        f"{name}: {done_of} in {played.seconds:.1f} s; answers by status {played.statuses}, {load.seen.broken} broken", highlight=False
    )
    return played


async def _strike(run: LocalRun, planned: Plan, played: Played) -> None:
    began = monotonic()
    for at, engine_id, blow in planned.blows:
        await asyncio.sleep(max(0.0, began + at - monotonic()))
        pid = run.crew.engines[engine_id].unit.pid()
        if pid is not None:
            os.kill(pid, blow)
            played.faults += 1


def table(played: Sequence[Played], calm: Played) -> Table:
    made = Table(
        "trial.recovery", "lost", "attempts", "tokens", "useful", "seconds", "ratio", title="the same trials and faults, by policy"
    )
    for column in made.columns[1:]:
        column.justify = "right"
    for each in played:
        row = each.row(calm)
        made.add_row(
            each.name, f"{row['trials_lost']} of {row['trials']}", str(row["attempts"]), f"{row['tokens_generated']:,}",
            f"{100 * row['tokens_useful_share']:.1f} %", f"{row['seconds']:.1f}", f"{row['seconds_ratio']:.2f}",
        )  # fmt: skip
    return made
