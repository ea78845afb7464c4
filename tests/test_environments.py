"""Trials with tools, through the real stack: the agent's process killed at every point, its sandbox killed, both. What becomes of
the trial is what becomes of it without faults, and tools run as often as their environment promises."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from rollout_ft.config import Config, TrialConfig
from rollout_ft.errors import BadRequest
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.attempt import workshop
from rollout_ft.trial.environment import Ability
from rollout_ft.trial.runner import TrialResult, TrialRunner
from rollout_ft.trial.sandbox import LocalSandbox
from rollout_ft.types import JSON

pytestmark = [pytest.mark.timeout(150), pytest.mark.asyncio(loop_scope="module")]
TURNS = 4
TASK: JSON = {"task_id": "tools", "prompt": "Tidy up.", "turns": TURNS, "max_tokens": 16, "seed": 3}


@dataclass
class Sandboxes:
    """Sandboxes of one ability, the steps that were taken in them, and what is to happen in the N-th step of the first."""

    ability: Ability
    at: int = 0
    kill: str = ""
    agent: ProcessAgent | None = None
    trial_id: str = ""
    taken: Counter[int] = field(default_factory=Counter[int])
    paths: list[Path] = field(default_factory=list[Path])

    def make(self, task: JSON, trial_id: str, directory: Path) -> Watched:
        return Watched(self, directory)

    async def begun(self, sandbox: Watched, number: int) -> None:
        """Step `number` has begun: kills what is to be killed there, once."""
        if number != self.at or not self.kill:
            return
        kill, self.kill = self.kill, ""
        if "agent" in kill:
            assert self.agent is not None
            assert self.agent.kill(self.trial_id)
        if "sandbox" in kill:
            pid = sandbox.pid()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)


class Watched(LocalSandbox):
    def __init__(self, all_of_them: Sandboxes, directory: Path):
        super().__init__(directory, {})
        self._all, self.ability = all_of_them, all_of_them.ability
        all_of_them.paths.append(self._live)

    async def step(self, action: JSON, key: str) -> JSON:
        self._all.taken[action["number"]] += 1
        await self._all.begun(self, action["number"])
        if self.ability is Ability.STATELESS:  # what it says follows from the action alone
            action = {**action, "command": action["command"].replace("; cat log", "; tail -n1 log")}
        return await super().step(action, key)


@dataclass
class Stage:
    run: LocalRun
    agent: ProcessAgent
    directory: Path
    played: int = 0

    async def play(self, sandboxes: Sandboxes, task: JSON, **config: Any) -> tuple[TrialResult, JSON]:
        self.played += 1
        prefix = f"p{self.played}-"
        sandboxes.agent, sandboxes.trial_id = self.agent, f"{prefix}{task['task_id']}"
        kept: list[tuple[TrialResult, JSON]] = []
        settings = TrialConfig(sandbox_dir=str(self.directory), **config)
        async with workshop(settings, sandboxes.make, None) as made:
            runner = TrialRunner(self.run.client, self.agent, settings, self.run.keys.session, workshop=made)
            await runner.run([task], concurrency=1, prefix=prefix, on_result=lambda r, t: kept.append((r, t)))
        assert not [path for path in sandboxes.paths if path.exists()], "a sandbox outlived its attempt"
        assert not (self.directory / sandboxes.trial_id).exists(), "a trial that is over left something"
        return kept[0]

    async def in_turn(self, trial_id: str, number: int) -> None:
        """Returns when an engine is at the trial's turn `number`."""
        while True:
            trial: JSON = {}
            with contextlib.suppress(BadRequest):  # it is not there yet
                trial = await self.run.client.trial(trial_id)
            if trial.get("turns") == number - 1 and (trial.get("activity") or {}).get("turn_s", 0) > 0:
                return
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Stage]:
    engine = {"count": 1, "stream_interval_tokens": 2, "args": ["--model", "hash", "--tokens-per-s", "80"]}
    agent = ProcessAgent("tool_agent:run")
    try:
        async with local_run(Config.model_validate({"engine": engine})) as run:
            yield Stage(run, agent, tmp_path_factory.mktemp("sandboxes"))
    finally:
        agent.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def without(stage: Stage) -> dict[Ability, tuple[TrialResult, JSON]]:
    """Each kind of environment without faults."""
    return {ability: await stage.play(Sandboxes(ability), TASK) for ability in Ability}


def expect_same(one: tuple[TrialResult, JSON], other: tuple[TrialResult, JSON]) -> None:
    assert (one[0].outcome, one[0].reward, one[0].turns) == (other[0].outcome, other[0].reward, other[0].turns)
    assert len(one[1]["paths"]) == len(other[1]["paths"]) == 1
    for name in ("token_ids", "loss_mask", "logprobs"):
        np.testing.assert_array_equal(one[1]["paths"][0][name], other[1]["paths"][0][name])


POINTS = [f"{where}:{number}" for number in range(1, TURNS + 1) for where in ("before", "request", "tool", "between")]


@pytest.mark.parametrize("ability", Ability)
@pytest.mark.parametrize("point", POINTS)
async def test_an_agent_that_is_killed_anywhere_changes_neither_its_trial_nor_how_often_its_tools_run(
    stage: Stage, without: dict[Ability, tuple[TrialResult, JSON]], ability: Ability, point: str
):
    where, _, number = point.partition(":")
    sandboxes, task = Sandboxes(ability), TASK
    if where in ("before", "between"):
        task = {**TASK, "die": point}
    if where == "tool":
        sandboxes = Sandboxes(ability, at=int(number), kill="agent")
    playing = asyncio.create_task(stage.play(sandboxes, task))
    if where == "request":
        await stage.in_turn(f"p{stage.played + 1}-{task['task_id']}", int(number))
        assert stage.agent.kill(sandboxes.trial_id)
    result = await playing
    expect_same(result, without[ability])
    assert result[0].attempts == 2
    recorded = int(number) - (where in ("before", "request"))
    again = recorded if ability is Ability.RESTART_ONLY and recorded < TURNS else 0
    assert dict(sandboxes.taken) == {n: 1 + (n <= again) for n in range(1, TURNS + 1)}


@pytest.mark.parametrize("ability", Ability)
@pytest.mark.parametrize("kill", ["sandbox", "sandbox and agent"])
@pytest.mark.parametrize("number", range(1, TURNS + 1))
async def test_a_sandbox_that_is_killed_in_mid_tool_costs_that_tool_and_those_that_rebuild_it(
    stage: Stage, without: dict[Ability, tuple[TrialResult, JSON]], ability: Ability, kill: str, number: int
):
    sandboxes = Sandboxes(ability, at=number, kill=kill)
    result = await stage.play(sandboxes, TASK)
    expect_same(result, without[ability])
    assert result[0].attempts == 1 + ("agent" in kill)
    assert sandboxes.taken[number] >= 2, "nobody knows whether it was done"
    for other in range(1, TURNS + 1):
        rebuilt = ability is Ability.RESTART_ONLY and other <= number
        assert 1 <= sandboxes.taken[other] <= 1 + (other == number) + 2 * rebuilt


@pytest.mark.parametrize("point", ["before:3", "between:2", "between:4"])
async def test_an_agent_that_starts_from_messages_asks_for_nothing_again(
    stage: Stage, without: dict[Ability, tuple[TrialResult, JSON]], point: str
):
    sandboxes = Sandboxes(Ability.EXPORT_RESTORE)
    result = await stage.play(sandboxes, {**TASK, "die": point, "from_messages": True})
    expect_same(result, without[Ability.EXPORT_RESTORE])
    assert result[1]["metadata"]["replayed"] == 0
    assert set(sandboxes.taken.values()) == {1}


async def test_results_that_are_not_recorded_are_had_again_from_the_tools(stage: Stage, without: dict[Ability, tuple[TrialResult, JSON]]):
    sandboxes = Sandboxes(Ability.RESTART_ONLY)
    result = await stage.play(sandboxes, {**TASK, "die": "before:3"}, record_tools=False)
    expect_same(result, without[Ability.RESTART_ONLY])
    assert dict(sandboxes.taken) == {1: 2, 2: 2, 3: 1, 4: 1}


async def test_a_sandbox_that_is_lost_more_often_than_it_may_is_the_outcome_and_no_reward(stage: Stage):
    class Doomed(Sandboxes):
        async def begun(self, sandbox: Watched, number: int) -> None:
            self.kill, self.at = "sandbox", number
            await super().begun(sandbox, number)

    result, _ = await stage.play(Doomed(Ability.EXPORT_RESTORE), TASK, max_env_restarts=2)
    assert (result.outcome, result.reward) == ("env_failed", None)
    assert "trial.max_env_restarts" in result.cause
