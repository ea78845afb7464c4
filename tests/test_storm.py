"""Storms at a small scale, through the real stack: more load than the engines can bear, engines that refuse, and the faults
of `bench storm`. Nothing is lost, and every turn is generated once."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rollout_ft.cli.bench import storm
from rollout_ft.clock import monotonic
from rollout_ft.config import Config, TrialConfig
from rollout_ft.testing.impatient import Impatient, Patience
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome, Recovery

pytestmark = pytest.mark.timeout(180)
TOKENS, TURNS = 24, 3


def config(directory: str, *args: str, count: int = 2, **engine: Any) -> Config:
    settings: JSON = {
        "count": count, "stream_interval_tokens": 8, "first_token_timeout_s": 30, "token_timeout_s": 20,
        "args": ["--model", "hash", "--tokens-per-s", "60", "--count-file", f"{directory}/{{engine}}.count", *args],
    }  # fmt: skip
    return Config.model_validate({"engine": {**settings, **engine}, "gateway": {"deadline_margin_s": 1}, "session": {"grace_s": 20}})


class Outcomes:
    """What became of the trials of one run, and what its engines sampled for it."""

    def __init__(self, directory: str):
        self._directory = directory
        self.results: list[TrialResult] = []
        self.turns: list[int] = []
        self.tokens = 0

    def done(self, result: TrialResult, trajectory: JSON) -> None:
        self.results.append(result)
        self.turns.append(result.turns)
        self.tokens += sum(int(np.sum(path["loss_mask"])) for path in trajectory["paths"])

    @property
    def sampled(self) -> int:
        return sum(int(np.fromfile(path, "<u8")[0]) for path in Path(self._directory).glob("*.count"))


async def played(run: LocalRun, outcomes: Outcomes, trials: int, patience: Patience) -> Impatient:
    tasks: Sequence[JSON] = [{"task_id": f"t{i}", "tokens": [TOKENS] * TURNS, "tools_s": [0.0] * TURNS} for i in range(trials)]
    load = Impatient(patience)
    try:
        await run.run_trials(tasks, load.play, prefix="", config=TrialConfig(concurrency=trials), on_result=outcomes.done)
    finally:
        await load.aclose()
    return load


async def test_five_times_the_load_of_the_engines_loses_nothing_and_generates_every_turn_once():
    with tempfile.TemporaryDirectory() as directory:
        async with local_run(config(directory, "--max-running-requests", "2", admission={"min_calls": 1})) as run:
            outcomes = Outcomes(directory)
            load = await played(run, outcomes, 20, Patience(scale=150))
        assert [r.outcome for r in outcomes.results] == [Outcome.COMPLETED] * 20
        assert outcomes.turns == [TURNS] * 20
        assert outcomes.sampled == outcomes.tokens == 20 * TURNS * TOKENS
        assert all(r.attempts == 1 for r in outcomes.results), load.seen


async def test_engines_with_full_queues_cost_time_and_no_turn():
    args = ("--max-running-requests", "2", "--max-queued-requests", "0")
    with tempfile.TemporaryDirectory() as directory:
        async with local_run(config(directory, *args, count=1, admission={"min_calls": 4, "start_calls": 64})) as run:
            outcomes = Outcomes(directory)
            await played(run, outcomes, 8, Patience(scale=30))
            events = {e["event"] for e in run.events.take()}
        assert [r.outcome for r in outcomes.results] == [Outcome.COMPLETED] * 8
        assert outcomes.sampled == outcomes.tokens == 8 * TURNS * TOKENS
        assert "engine.dead" not in events


async def test_what_nobody_wants_any_more_is_seen_to_leave_the_engine():
    with tempfile.TemporaryDirectory() as directory:
        async with local_run(config(directory, count=1)) as run:
            session = await run.client.open_session(trial_id="t")
            task: JSON = {"task_id": "t", "tokens": [6000], "tools_s": [0.0]}
            load = Impatient(Patience(scale=1))
            asking = asyncio.create_task(load.play(task, session))
            driver = run.crew.engines["engine-0"].driver
            await until_load(driver, 1)
            await run.client.request("DELETE", f"/sessions/{session.session_id}", key=session.api_key)
            await until_load(driver, 0)
            ends = monotonic() + 10
            while driver.orphans.left:
                assert monotonic() < ends
                await asyncio.sleep(0.01)
            assert not [e for e in run.events.take() if e["event"] == "orphans.linger"]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await load.aclose()


async def until_load(driver: Any, load: int) -> None:
    ends = monotonic() + 20
    while await driver.engine.load() != load:
        assert monotonic() < ends
        await asyncio.sleep(0.01)


async def test_a_storm_loses_no_trial_and_wastes_next_to_nothing():
    scale = storm.Scale(trials=16, engines=4, scale=120.0)
    planned = storm.plan(scale)
    assert planned.slow
    assert planned.blows
    figures = await storm.play("resume", scale, planned, Recovery.RESUME, Console(quiet=True))
    assert (len(figures.results), figures.lost) == (16, 0)
    assert figures.faults > 0
    assert figures.useful >= 0.95 * figures.generated


def test_a_plan_is_the_same_for_the_same_seed_and_another_for_another():
    assert storm.plan(storm.Scale(seed=1)) == storm.plan(storm.Scale(seed=1))
    assert storm.plan(storm.Scale(seed=1)) != storm.plan(storm.Scale(seed=2))
