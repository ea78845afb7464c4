"""Groups of a whole run: a member is lost for good, and its group is completed, shrunk or dropped, on real engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rollout_ft.config import Config, TrialConfig
from rollout_ft.samples.advantages import group_advantages
from rollout_ft.testing.impatient import Impatient, Patience
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.client import Session
from rollout_ft.trial.groups import GroupResult
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

TASKS: list[JSON] = [{"task_id": name, "seed": 5, "tokens": [8], "tools_s": [0.0]} for name in ("a", "b")]


class APIConnectionError(Exception):
    """As the SDKs name it."""


@dataclass
class Played:
    """Agents that die in every attempt of the trials in `mortal`, after their turn; the others earn what they sampled."""

    run: LocalRun
    mortal: frozenset[str] = frozenset()
    begun: Counter[str] = field(default_factory=Counter[str])
    results: list[TrialResult] = field(default_factory=list[TrialResult])
    groups: list[GroupResult] = field(default_factory=list[GroupResult])
    sampled: dict[str, bytes] = field(default_factory=dict[str, bytes])

    async def play(self, *mortal: str, **rules: Any) -> None:
        self.mortal, load = frozenset(mortal), Impatient(Patience(scale=100))

        async def agent(task: JSON, session: Session) -> float:
            self.begun[session.trial_id] += 1
            await load.play(task, session)
            if session.trial_id in self.mortal:
                raise APIConnectionError
            return len(self.begun) / 16

        def done(result: TrialResult, trajectory: JSON) -> None:
            self.sampled[result.trial_id] = b"".join(np.asarray(path["token_ids"], np.int32).tobytes() for path in trajectory["paths"])

        config = TrialConfig(group_size=3, concurrency=1, max_restarts=0, **rules)
        try:
            self.results = await self.run.run_trials(
                TASKS, agent, prefix="", config=config, on_result=done, on_group=self.groups.append
            )  # fmt: skip
        finally:
            await load.aclose()

    def rewards(self, *trials: str) -> list[float | None]:
        by_id = {result.trial_id: result.reward for result in self.results}
        return [by_id[trial_id] for trial_id in trials]


@pytest.fixture
async def played() -> AsyncIterator[Played]:
    engine: JSON = {"count": 1, "args": ["--model", "hash", "--tokens-per-s", "0"]}
    async with local_run(Config.model_validate({"engine": engine})) as run:
        yield Played(run)


async def test_siblings_are_other_samples_of_their_task_and_know_their_group(played: Played):
    await played.play()
    assert [(r.trial_id, r.task_id, r.group_id) for r in played.results] == [(f"{g}.{k}", g, g) for g in "ab" for k in range(3)]
    assert len(set(played.sampled.values())) == 6
    assert (await played.run.client.trial("b.2"))["group_id"] == "b"
    whole = [f"a.{k}" for k in range(3)]
    assert [group for group in played.groups if group.group_id == "a"] == [GroupResult("a", "whole", whole, [], played.rewards(*whole))]


async def test_a_lost_member_is_replaced_by_another_sample_before_the_next_group_is_begun(played: Played):
    await played.play("a.1", "a.1.r1", on_lost_member="complete", max_replacements=2)
    assert list(played.begun) == ["a.0", "a.1", "a.1.r1", "a.1.r2", "a.2", "b.0", "b.1", "b.2"]
    assert [result.trial_id for result in played.results] == ["a.0", "a.1", "a.1.r1", "a.1.r2", "a.2", "b.0", "b.1", "b.2"]
    trials = ["a.0", "a.1.r2", "a.2"]
    assert played.groups[0] == GroupResult("a", "completed", trials, ["a.1", "a.1.r1"], played.rewards(*trials))
    assert len(set(played.sampled.values())) == 8
    assert [result.reward for result in played.results if result.lost] == [None, None]
    assert None not in group_advantages(played.groups[0].rewards)


async def test_a_group_with_more_losses_than_may_be_replaced_is_dropped_and_the_next_is_whole(played: Played):
    await played.play("a.0", "a.0.r1", on_lost_member="complete", max_replacements=1)
    assert [(group.group_id, group.status, group.trials) for group in played.groups] == [
        ("a", "dropped", []), ("b", "whole", ["b.0", "b.1", "b.2"]),
    ]  # fmt: skip
    assert played.groups[0].lost == ["a.0", "a.0.r1"]


async def test_a_group_shrinks_to_the_members_that_are_left(played: Played):
    await played.play("b.0")
    assert played.groups[1] == GroupResult("b", "shrunk", ["b.1", "b.2"], ["b.0"], played.rewards("b.1", "b.2"))


async def test_a_group_that_is_dropped_costs_nothing_more(played: Played):
    await played.play("a.0", on_lost_member="drop")
    assert played.groups[0] == GroupResult("a", "dropped", [], ["a.0"], [])
    assert set(played.begun) == {"a.0", "b.0", "b.1", "b.2"}
    assert [(r.trial_id, r.outcome, r.reward, r.recorded) for r in played.results[:3]] == [
        ("a.0", "infra_exhausted", None, True), ("a.1", "cancelled", None, False), ("a.2", "cancelled", None, False),
    ]  # fmt: skip


async def test_a_fault_that_is_survived_moves_no_group(played: Played):
    """Restarts come first; a member is lost when they are spent."""
    died: set[str] = set()
    config = TrialConfig(group_size=3, concurrency=2, max_restarts=1, on_lost_member="drop")

    async def agent(task: JSON, session: Session) -> float:
        if session.trial_id not in died:
            died.add(session.trial_id)
            raise APIConnectionError
        return 1.0

    def done(result: TrialResult, trajectory: JSON) -> None:
        played.results.append(result)

    results = await played.run.run_trials(TASKS, agent, prefix="x-", config=config, on_result=done, on_group=played.groups.append)
    assert [result.attempts for result in results] == [2] * 6
    assert [(group.group_id, group.status) for group in played.groups] == [("x-a", "whole"), ("x-b", "whole")]
