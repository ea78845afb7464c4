"""A real run whose agent reads the clock and is killed half-way: what its trial becomes, as the config says.

Gateway, sessions, engines that are processes, agents that are processes; the run without faults is played beside, by the same
agent at the times that the record has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from clock_agent import clocks_of

from rollout_ft.config import Config
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.runner import TrialResult, TrialRunner
from rollout_ft.types import JSON

pytestmark = pytest.mark.timeout(180)
TURNS, KILL_AT = 6, 3


def config(**settings: Any) -> Config:
    engine = {"count": 1, "args": ["--model", "hash", "--tokens-per-s", "0"], "first_token_timeout_s": 60, "token_timeout_s": 60}
    return Config.model_validate({"engine": engine, **settings})


class Played:
    """One trial that is killed, and what its agent read off the clock."""

    def __init__(self, run: LocalRun, directory: Path):
        self._run, self._directory = run, directory
        self.agent = ProcessAgent("clock_agent:run")

    async def play(self, name: str, clocks: Sequence[str] = ()) -> tuple[TrialResult, JSON]:
        """With `clocks` it is the trial without a fault."""
        task = {
            "task_id": name, "turns": TURNS, "kill_at": TURNS if clocks else KILL_AT, "clocks": list(clocks), "seed": 3,
            "notes": str(self.notes(name)),
        }  # fmt: skip
        kept: list[JSON] = []
        runner = TrialRunner(self._run.client, self.agent, self._run.config.trial, self._run.keys.session)
        (result,) = await runner.run([task], concurrency=1, on_result=lambda _, t: kept.append(t))
        return result, kept[0]

    def notes(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"

    def clocks(self) -> tuple[list[str], list[str]]:
        return clocks_of(self.notes("killed"))

    async def same_as_without_faults(self, found: tuple[TrialResult, JSON], clocks: Sequence[str]) -> None:
        (result, trajectory), (calm, reference) = found, await self.play("calm", clocks)
        assert (result.outcome, result.reward, calm.attempts) == ("completed", calm.reward, 1)
        assert len(trajectory["paths"]) == 1
        for key in ("token_ids", "loss_mask", "logprobs"):
            assert [p[key] for p in trajectory["paths"]] == [p[key] for p in reference["paths"]], key

    def diverged(self) -> list[JSON]:
        return [event for event in self._run.events.take() if event["event"] == "trial.diverged"]


async def test_with_a_normalizer_the_trial_is_that_of_a_run_without_faults(tmp_path: Path):
    async with local_run(config(session={"normalizers": ["timestamps"]})) as run:
        p = Played(run, tmp_path)
        result, trajectory = await p.play("killed")
        first, second = p.clocks()
        assert first != second[: KILL_AT + 1]
        assert (result.attempts, result.divergences, result.tokens_wasted, p.diverged()) == (2, 0, 0, [])
        about = trajectory["metadata"]
        assert (about["turns_committed"], about["replayed"], about["normalized"]) == (TURNS, KILL_AT + 1, KILL_AT)
        await p.same_as_without_faults((result, trajectory), [*first[:KILL_AT], *second[KILL_AT:]])
        p.agent.close()


async def test_served_from_the_record_the_trial_is_that_of_a_run_without_faults_and_counts(tmp_path: Path):
    async with local_run(config(trial={"on_divergence": "serve"})) as run:
        p = Played(run, tmp_path)
        result, trajectory = await p.play("killed")
        first, second = p.clocks()
        assert (result.attempts, result.divergences, result.tokens_wasted) == (2, KILL_AT, 0)
        assert [(e["turn"], e["served"]) for e in p.diverged()] == [(turn, True) for turn in range(2, KILL_AT + 2)]
        await p.same_as_without_faults((result, trajectory), [*first[:KILL_AT], *second[KILL_AT:]])
        p.agent.close()


async def test_a_branch_says_where_it_left_the_record_and_is_the_trial_at_the_later_time(tmp_path: Path):
    async with local_run(config()) as run:
        p = Played(run, tmp_path)
        result, trajectory = await p.play("killed")
        first, second = p.clocks()
        (event,) = p.diverged()
        assert (event["trial"], event["attempt"], event["turn"], event["message"], event["where"]) == ("killed", 2, 2, 2, "content")
        assert f"at {first[0]} the" in event["recorded"]
        assert f"at {second[0]} the" in event["sent"]
        assert (result.attempts, result.divergences) == (2, 1)
        assert result.tokens_wasted > 0
        assert trajectory["metadata"]["first_divergence"]["sent"] == event["sent"]
        await p.same_as_without_faults((result, trajectory), second)
        p.agent.close()


async def test_a_trial_that_may_not_diverge_ends_without_a_reward_and_says_why(tmp_path: Path):
    async with local_run(config(trial={"on_divergence": "fail"})) as run:
        p = Played(run, tmp_path)
        result, _ = await p.play("killed")
        assert (result.outcome, result.reward, result.attempts, result.divergences) == ("infra_exhausted", None, 2, 1)
        assert result.cause.startswith("diverged: turn 2: message 2 (user), content: recorded 'at ")
        assert "trial.on_divergence: fail" in result.cause
        p.agent.close()
