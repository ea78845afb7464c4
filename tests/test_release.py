"""A trial that was collected is forgotten by a real run, but for what a person wants to know of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from ray_run import Stage, staged

from rollout_ft.checkpoint.offline import Trials
from rollout_ft.checkpoint.ports import resolve
from rollout_ft.checkpoint.reading import journal_names
from rollout_ft.errors import BadRequest

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "timeout_s": 2.0, "max_tokens": 48}


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(journals: Path) -> AsyncGenerator[Stage]:
    async with staged(f"store.journal_dir={journals}") as made:
        yield made


async def kept(stage: Stage) -> list[tuple[int, int]]:
    """`(entries, bytes in memory)` of each replica."""
    members = (await stage.run.fleet())["view"]["members"]
    described = [await resolve(name, stage.run.setup.namespace).describe() for name in members]
    return [(each["entries"], each["bytes_in_memory"]) for each in described]


async def refusal(stage: Stage, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    with pytest.raises(BadRequest) as refused:
        await stage.run.client.request(method, path, body)
    return refused.value.status, refused.value.code


async def test_a_collected_trial_takes_nothing_and_can_still_be_asked_about(stage: Stage, journals: Path) -> None:
    before = await kept(stage)
    result, trajectory = await stage.play("collected", TASK, release=True)
    assert len(trajectory["paths"]) == 1
    assert await kept(stage) == before
    trial = await stage.run.client.trial("collected-q")
    assert (trial["state"], trial["outcome"], trial["reward"]) == ("released", "completed", result.reward)
    assert (trial["turns"], trial["metadata"]["turns_committed"]) == (3, 3)
    assert await stage.run.client.release("collected-q") == trial
    assert await refusal(stage, "GET", f"/sessions/{trial['session_id']}/trajectory") == (401, "invalid_api_key")
    for name in journal_names(journals):
        assert Trials(journals, name).note("collected-q")


async def test_a_released_trial_is_over_for_everybody(stage: Stage) -> None:
    client = stage.run.client
    session = await client.open_session(trial_id="over", task_id="q")
    assert await refusal(stage, "POST", "/trials/over/release") == (409, "trial_running")
    ended = await client.outcome("over", "completed", 1.0, "", 1)
    assert ended["state"] == "ended"
    await client.release("over")
    assert (await client.outcome("over", "completed", 1.0, "", 1))["state"] == "released"
    assert await refusal(stage, "POST", "/trials/over/restart", {"from_attempt": 1}) == (409, "trial_ended")
    assert await refusal(stage, "POST", "/sessions", {"trial_id": "over", "resume": True}) == (409, "trial_ended")
    assert await refusal(stage, "POST", "/trials/nobody/release") == (404, "unknown_trial")
    with pytest.raises(BadRequest, match="was collected and released") as gone:
        await session.trajectory()
    assert (gone.value.status, gone.value.code) == (404, "released")


async def test_what_was_not_collected_stays(stage: Stage) -> None:
    await stage.play("stays", TASK)
    assert all(entries > 3 for entries, _ in await kept(stage))
    assert (await stage.run.client.trial("stays-q"))["state"] == "ended"
