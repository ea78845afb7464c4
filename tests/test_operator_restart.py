"""A trial that a person restarts while its agent goes on: `rollout-ft trial restart`, on a real run."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import orjson
import pytest
from ray_run import Stage, staged

from rollout_ft.cli.restart import restart
from rollout_ft.cli.status import GATEWAY_URL, OPERATOR_KEY, Where
from rollout_ft.config import TrialConfig
from rollout_ft.errors import ConfigError
from rollout_ft.trial.agents import InlineAgent
from rollout_ft.trial.client import Session
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

NONE_LEFT = TrialConfig(max_restarts=0, max_env_restarts=0, max_agent_restarts=0)
Between = Callable[[Session], Awaitable[Any]]


def where(stage: Stage) -> Where:
    return Where(stage.run.gateway_url, stage.run.operator_key)


async def command(stage: Stage, *arguments: str) -> bytes:
    env = os.environ | {GATEWAY_URL: stage.run.gateway_url, OPERATOR_KEY: stage.run.operator_key}
    said = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "rollout_ft.cli.main", *arguments, env=env, stdout=said)
    made, _ = await process.communicate()
    assert process.returncode == 0
    return made


def turns(between: Between, count: int = 2) -> InlineAgent:
    """Asks so many times; in the first attempt something happens before the last one."""

    async def agent(task: JSON, session: Session) -> float:
        client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
        messages: list[Any] = [{"role": "user", "content": task["prompt"]}]
        for number in range(count):
            if number == count - 1 and session.attempt == 1:
                await between(session)
            reply = await client.chat.completions.create(model="m", messages=messages, max_tokens=8)
            messages += [reply.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "Go on."}]
        await client.close()
        return 1.0

    return InlineAgent(agent)


async def played(stage: Stage, trial_id: str, agent: InlineAgent) -> TrialResult:
    results = await stage.run.run_trials([{"task_id": trial_id, "prompt": "Explain tides."}], agent, prefix="", config=NONE_LEFT)
    return results[0]


@pytest.mark.timeout(180)
async def test_a_trial_that_a_person_restarts_goes_on_in_its_next_attempt_and_spends_nothing():
    async with staged() as stage:

        async def from_its_checkpoint(session: Session) -> None:
            made = await command(stage, "trial", "restart", session.trial_id, "--cause", "its tool hangs", "--json")
            assert orjson.loads(made) == {"trial_id": "kept", "attempt": 2, "turns": 1}

        result = await played(stage, "kept", turns(from_its_checkpoint))
        assert (result.outcome, result.reward, result.attempts) == ("completed", 1.0, 2)
        assert result.tokens_wasted == 0

        async def from_nothing(session: Session) -> None:
            made = await restart(where(stage), session.trial_id, session.attempt, scratch=True, cause="")
            assert (made["attempt"], made["turns"]) == (2, 0)
            assert await restart(where(stage), session.trial_id, session.attempt, scratch=True, cause="") == made, "asked twice"

        result = await played(stage, "scratch", turns(from_nothing))
        assert (result.outcome, result.attempts) == ("completed", 2)
        assert result.tokens_wasted > 0

        with pytest.raises(ConfigError, match="unknown_trial"):
            await restart(where(stage), "nobody", None, scratch=False, cause="")
        with pytest.raises(ConfigError, match=r"trial_ended|released"):
            await restart(where(stage), "kept", None, scratch=False, cause="")
    told = [(e["reason"], e["cause"]) for e in stage.events if e["event"] == "trial.restarted"]
    assert told == [("asked", "its tool hangs"), ("asked", "")]


@pytest.mark.timeout(120)
async def test_what_an_agent_returns_after_its_attempt_was_replaced_is_no_outcome():
    async with staged() as stage:
        rewards = iter([0.25, 0.75])

        async def agent(task: JSON, session: Session) -> float:
            client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello."}], max_tokens=8)
            await client.close()
            if session.attempt == 1:
                await restart(where(stage), session.trial_id, None, scratch=False, cause="")
            return next(rewards)

        result = await played(stage, "late", InlineAgent(agent))
        assert (result.outcome, result.reward, result.attempts) == ("completed", 0.75, 2)


@pytest.mark.timeout(120)
async def test_a_restart_between_the_agents_end_and_its_outcome_is_followed(monkeypatch: pytest.MonkeyPatch):
    async with staged() as stage:
        client = stage.run.client
        record = client.outcome

        async def late(trial_id: str, outcome: str, reward: float | None, cause: str, attempt: int) -> JSON:
            if attempt == 1:
                await restart(where(stage), trial_id, None, scratch=False, cause="")
            return await record(trial_id, outcome, reward, cause, attempt)

        monkeypatch.setattr(client, "outcome", late)
        result = await played(stage, "raced", turns(lambda _: asyncio.sleep(0)))
        assert (result.outcome, result.reward, result.attempts) == ("completed", 1.0, 2)
