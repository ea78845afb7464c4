"""mini-swe-agent's own agent, model and local environment as the program of an attempt, killed wherever it can be."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from attempts import DRIVERS, POINTS, Attempts, Played, judge
from foreign import QUIET, ROOT, python_of
from ray_run import staged

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

TURNS = 4
VERIFY = "python3 -c \"print(int(open('notes').read().split()[-1], 16) / 16**12)\""
"""What the last command wrote depends on the last reply, as the reward does."""
TASK = {"task_id": "m", "prompt": "Fix the bug.", "seed": 5, "setup": "echo begun > notes", "verify": VERIFY}
OVERRIDES = ["mini", "model.model_class=scripted_mini_swe_agent.Model", "model.model_kwargs.max_tokens=48"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attempts(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Attempts]:
    argv = [str(python_of("mini-swe-agent-2")), "-m", "rollout_ft.integrations.mini_swe_agent", *OVERRIDES]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, "PYTHONPATH": f"{ROOT}:{DRIVERS}"}.items():
            patch.setenv(name, value)
        async with staged() as stage:
            yield Attempts(stage, argv, TASK, tmp_path_factory.mktemp("faults"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(attempts: Attempts) -> Played:
    played = await attempts.play("clean")
    assert (played.result.outcome, played.result.attempts, played.result.tokens_wasted) == ("completed", 1, 0), played.result
    assert 0 < (played.result.reward or 0) < 1
    judge(played, played, turns=TURNS)
    return played


@pytest.mark.parametrize("turn", range(1, TURNS + 1))
@pytest.mark.parametrize("point", POINTS)
async def test_an_agent_that_is_killed_goes_on_where_it_was(attempts: Attempts, clean: Played, point: str, turn: int):
    if (point, turn) == ("after", TURNS):
        pytest.skip("the last command ends the agent")
    played = await attempts.play(f"{point}{turn}", (point, turn))
    judge(played, clean, (point, turn), turns=TURNS)


async def test_an_agent_that_is_killed_in_every_turn_goes_on_where_it_was(attempts: Attempts, clean: Played):
    points = [("tool", 1), ("request", 2), ("after", 3), ("reply", 4)]
    judge(await attempts.play("all", *points), clean, *points, turns=TURNS)
