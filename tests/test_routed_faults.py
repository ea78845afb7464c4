"""Routed experts under faults, on real Ray with real processes: a trial keeps its rows or says which are lost."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from ray_run import Stage, staged
from test_faults import TASK

from rollout_ft.rayapi import ray
from rollout_ft.samples.routed import array_of
from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.testing.small_engine.routed import Experts

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

EXPERTS = Experts(4, 2, 64)
SETTINGS = ["samples.routed_experts=true", "model.experts={layers: 4, topk: 2, count: 64}"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    async with staged(*SETTINGS) as made:
        yield made


def check(path: dict[str, Any], missing: list[list[int]]) -> None:
    """Every row is that of its token, but for those that are missing."""
    rows, expected = array_of(path["routed_experts"]), EXPERTS.rows(np.array(path["token_ids"], np.int32))[:-1]
    for a, b in missing:
        expected[a:b] = 0
    assert rows.dtype == np.uint8
    assert np.array_equal(rows, expected)
    assert path["routed_experts_missing"] == missing
    assert path["routed_experts_partial"] == bool(missing or path["routed_experts_substituted"])


async def stores(stage: Stage) -> dict[str, int]:
    """How many bytes of payloads each store of the view has, by name."""
    names = (await stage.run.fleet())["view"]["members"]
    return {name: (await ray.get_actor(name, stage.run.setup.namespace).describe.remote())["payload_bytes"] for name in names}


async def test_a_trial_without_faults_has_all_its_rows_on_one_store(stage: Stage):
    await stage.whole()
    before = await stores(stage)
    _, trajectory = await stage.play("whole", TASK)
    (path,) = trajectory["paths"]
    check(path, [])
    assert path["routed_experts_substituted"] == []
    more = [size - before[name] for name, size in (await stores(stage)).items()]
    assert sorted(more) == [0, (len(path["token_ids"]) - 1) * EXPERTS.layers * EXPERTS.topk]


@pytest.mark.parametrize("kind", [Kind.ENGINE_KILL, Kind.ACTOR_KILL])
async def test_after_an_engine_died_in_the_middle_of_a_turn_its_rows_are_there_and_marked(stage: Stage, kind: Kind):
    await stage.whole()
    fault = Fault(kind, f"{kind}-q", 2, 24)
    result, trajectory = await stage.play(str(kind), TASK, fault)
    assert (result.outcome, result.attempts) == ("completed", 1)
    assert fault.id in await stage.fired()
    (path,) = trajectory["paths"]
    check(path, [])
    start = path["turns"][1]["start"] - 1
    expected = [[start, start + result.tokens_reused]] if result.tokens_reused else []
    assert path["routed_experts_substituted"] == expected
    assert result.tokens_reused or kind is Kind.ACTOR_KILL


async def test_an_agent_that_is_killed_and_replayed_finds_the_rows_it_had(stage: Stage):
    await stage.whole()
    result, trajectory = await stage.play("replayed", TASK, Fault(Kind.AGENT_KILL, "replayed-q", 3, 8))
    assert result.attempts == 2
    check(trajectory["paths"][0], [])


async def test_with_the_store_that_has_the_only_copy_the_rows_so_far_are_lost_and_no_turn(stage: Stage):
    await stage.whole()
    run = stage.run
    before = await stores(stage)
    session = await run.open_session(trial_id="orphaned")
    first = await ask(session, [{"role": "user", "content": "one"}])
    (holder,) = [name for name, size in (await stores(stage)).items() if size > before[name]]
    ray.kill(ray.get_actor(holder, run.setup.namespace), no_restart=True)
    await stage.whole()
    await ask(session, [{"role": "user", "content": "one"}, first, {"role": "user", "content": "two"}])
    (path,) = (await session.trajectory())["paths"]
    assert len(path["turns"]) == 2
    check(path, [[0, path["turns"][0]["end"] - 1]])
    ended = await run.client.outcome("orphaned", "completed", 1.0, "", 1)
    assert ended["outcome"] == "completed"
    again = await session.trajectory()
    assert again["paths"][0]["routed_experts_missing"] == [[0, path["turns"][0]["end"] - 1]]


async def ask(session: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 24}
    reply = await session.client.request("POST", f"/sessions/{session.session_id}/v1/chat/completions", body, key=session.api_key)
    return reply["choices"][0]["message"]
