"""Recorded steps through the real stack: what holds sessions is killed between them, and a whole run with its cluster."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
import pytest_asyncio
from ray_run import Stage, staged
from run_files import data, goes_on, kill, lines, settings

from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.trial.client import Session
from rollout_ft.trial.environment import Ability
from rollout_ft.types import JSON

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
TURNS = 3
KINDS = [Kind.ENGINE_KILL, Kind.ACTOR_KILL, Kind.STORE_KILL, Kind.GATEWAY_KILL]


class Counted:
    """A stateless environment: how often each of its tools ran, in all trials."""

    ability = Ability.STATELESS
    ran: ClassVar[Counter[str]] = Counter()

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def restore(self, snapshot: str) -> None: ...
    async def forget(self, snapshot: str) -> None: ...
    async def snapshot(self) -> str:
        return ""

    async def step(self, action: JSON, key: str) -> JSON:
        self.ran[f"{action['trial']} {action['turn']}"] += 1
        return {"ran": self.ran[f"{action['trial']} {action['turn']}"]}


async def agent(task: Any, session: Session) -> float:
    """Fails once behind its last step, as if its client had lost the infrastructure, so that everything is replayed."""
    assert session.environment is not None
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        for turn in range(TURNS):
            said = await client.chat.completions.create(model="default", messages=messages, max_tokens=48)
            result = await session.environment.step({"trial": session.trial_id, "turn": turn})
            messages += [{"role": "assistant", "content": said.choices[0].message.content}, {"role": "user", "content": json.dumps(result)}]
    if session.attempt == 1:
        raise type("APIConnectionError", (Exception,), {})("lost")
    return float(session.environment.counts.served)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    async with staged() as made:
        yield made


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_recorded_step_survives_whoever_held_its_session(stage: Stage, kind: Kind):
    await stage.whole()
    trial_id = f"{kind}-steps"
    await stage.arm(Fault(kind, trial_id, 2, 16))
    (result,) = await stage.run.run_trials([{"task_id": "steps"}], agent, prefix=f"{kind}-", environment=lambda *_: Counted())
    assert (result.outcome, result.reward, result.attempts) == ("completed", float(TURNS), 2)
    assert [Counted.ran[f"{trial_id} {turn}"] for turn in range(TURNS)] == [1] * TURNS


def test_a_run_with_sandboxes_that_was_killed_with_its_cluster_goes_on_from_their_snapshots(tmp_path: Path):
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "out"
    tasks.write_text("\n".join(json.dumps({"task_id": f"s{i}", "prompt": f"Write {i}.", "turns": 4, "max_tokens": 32}) for i in range(4)))
    ours = [
        "trial.agent=''", f"trial.command=[{sys.executable},examples/sandbox/agent.py]",
        "trial.environment=rollout_ft.trial.sandbox:local", "trial.concurrency=4",
    ]  # fmt: skip
    kill(_third_snapshots, out, *settings(tasks, speed="40"), *ours)
    assert list((out / "sandboxes").glob("*/snapshot-*"))
    code, err = goes_on(out)
    assert code == 0, err
    assert not (out / "sandboxes").exists(), "sandboxes of trials that are over are gone"
    assert {line["outcome"] for line in lines(out / "trials.jsonl")} == {"completed"}
    assert any(line["attempts"] == 2 for line in lines(out / "trials.jsonl"))
    assert len(data(out)) == 4


def _third_snapshots(out: Path) -> bool:
    """Some trial has taken its third step."""
    return any(len(path.read_text().splitlines()) >= 3 for path in out.glob("sandboxes/*/live-*/work/dates"))
