"""The example's tool loop as the program of an attempt, killed wherever it can be."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from attempts import DRIVERS, POINTS, Attempts, Played, judge
from ray_run import staged

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

TURNS = 4
TASK = {"task_id": "loop", "prompt": "Explain tides.", "turns": TURNS, "seed": 9, "max_tokens": 48}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attempts(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Attempts]:
    async with staged() as stage:
        argv = [sys.executable, str(DRIVERS / "killed_tool_loop.py")]
        yield Attempts(stage, argv, TASK, tmp_path_factory.mktemp("faults"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(attempts: Attempts) -> Played:
    played = await attempts.play("clean")
    assert (played.result.outcome, played.result.attempts, played.result.tokens_wasted) == ("completed", 1, 0), played.result
    judge(played, played, turns=TURNS)
    return played


@pytest.mark.parametrize("turn", range(1, TURNS + 1))
@pytest.mark.parametrize("point", POINTS)
async def test_an_agent_that_is_killed_goes_on_where_it_was(attempts: Attempts, clean: Played, point: str, turn: int):
    judge(await attempts.play(f"{point}{turn}", (point, turn)), clean, (point, turn), turns=TURNS)


async def test_an_agent_that_is_killed_in_every_turn_goes_on_where_it_was(attempts: Attempts, clean: Played):
    points = [("tool", 1), ("request", 2), ("after", 3), ("reply", 4)]
    judge(await attempts.play("all", *points), clean, *points, turns=TURNS)
