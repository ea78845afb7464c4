"""A stuck agent is told from a slow one, and every attempt ends."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.config import Config, TrialConfig
from rollout_ft.testing.local_run import local_run
from rollout_ft.trial.agents import InlineAgent
from rollout_ft.trial.attempt import workshop
from rollout_ft.trial.client import Session
from rollout_ft.trial.deadlines import SOON_S, Seen, judge, look_in_s
from rollout_ft.trial.environment import Ability
from rollout_ft.trial.policy import End
from rollout_ft.trial.runner import TrialResult, TrialRunner

few = settings(max_examples=300, deadline=None)
seconds = st.floats(0, 10_000)
SEEN = st.builds(Seen, seconds, seconds, st.integers(0, 3), seconds, st.booleans(), seconds, st.integers(0, 9))
LIMITS = st.builds(
    lambda attempt, idle, turn: TrialConfig(attempt_timeout_s=attempt, agent_idle_s=idle, turn_timeout_s=turn),
    st.floats(1, 5_000), st.floats(1, 5_000), st.none() | st.floats(1, 5_000),
)  # fmt: skip


@few
@given(SEEN, LIMITS)
def test_an_agent_that_waits_is_never_stuck(seen: Seen, config: TrialConfig):
    late = judge(seen, config)
    if seen.waiting or seen.tool:
        assert late is None or late.end is not End.STUCK


@few
@given(SEEN, LIMITS)
def test_an_attempt_that_has_passed_no_limit_goes_on(seen: Seen, config: TrialConfig):
    late = judge(seen, config)
    turn_late = config.turn_timeout_s is not None and seen.waiting and seen.turn_s >= config.turn_timeout_s
    idle = not seen.waiting and not seen.tool and min(seen.quiet_s, seen.elapsed_s) >= config.agent_idle_s
    assert (late is not None) == (turn_late or idle or seen.elapsed_s - seen.still_s >= config.attempt_timeout_s)
    if late is not None:
        assert "trial." in late.cause


@few
@given(SEEN, LIMITS)
def test_what_goes_on_as_it_is_seen_is_looked_at_when_its_first_limit_has_passed(seen: Seen, config: TrialConfig):
    wait_s = look_in_s(seen, config)
    assert wait_s >= SOON_S
    waits = bool(seen.waiting or seen.tool)

    def at(s: float) -> Seen:
        turn_s = seen.turn_s + s if seen.waiting else 0.0
        quiet_s = min(seen.quiet_s, seen.elapsed_s) + (0 if waits else s)
        return Seen(seen.elapsed_s + s, seen.still_s, seen.waiting, turn_s, seen.tool, quiet_s)

    if judge(at(0), config) is None:
        assert judge(at(wait_s - 2 * SOON_S), config) is None
        assert judge(at(wait_s), config) is not None or waits or config.turn_timeout_s is not None


class Slow:
    """An environment whose tools take as long as they are told."""

    ability = Ability.STATELESS

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def forget(self, snapshot: str) -> None: ...
    async def restore(self, snapshot: str) -> None: ...
    async def snapshot(self) -> str:
        return ""

    async def step(self, action: Any, key: str) -> Any:
        await asyncio.sleep(action["s"])
        return {"done": True}


async def play(agent: Any, **limits: Any) -> TrialResult:
    engine = {"count": 1, "args": ["--model", "hash", "--tokens-per-s", "200"]}
    config = TrialConfig(**limits)
    async with local_run(Config.model_validate({"engine": engine})) as run, workshop(config, lambda *_: Slow(), None) as made:
        runner = TrialRunner(run.client, InlineAgent(agent), config, run.keys.session, workshop=made)
        return (await runner.run([{"task_id": "t"}], concurrency=1))[0]


async def ask(session: Session, messages: list[Any]) -> None:
    async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        said = await client.chat.completions.create(model="default", messages=messages, max_tokens=8)
    messages += [{"role": "assistant", "content": said.choices[0].message.content}, {"role": "user", "content": "go on"}]


async def test_a_stuck_agent_is_started_again_and_gets_what_it_had_from_the_checkpoint():
    async def agent(task: Any, session: Session) -> float:
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        for turn in range(3):
            if session.attempt == 1 and turn == 2:
                await asyncio.Event().wait()
            await ask(session, messages)
        return 1.0

    result = await play(agent, agent_idle_s=1.0)
    assert (result.outcome, result.reward, result.attempts, result.turns) == ("completed", 1.0, 2, 3)
    assert result.tokens_wasted == 0


async def test_an_agent_that_is_stuck_again_and_again_has_failed_and_the_outcome_says_after_which_turn():
    async def agent(task: Any, session: Session) -> float:
        await ask(session, [{"role": "user", "content": "hi"}])
        await asyncio.Event().wait()
        return 1.0

    result = await play(agent, agent_idle_s=0.5)
    assert (result.outcome, result.reward, result.attempts) == ("agent_failed", None, 2)
    assert "stuck" in result.cause
    assert "after 1 turns" in result.cause


async def test_a_slow_tool_is_no_stuck_agent():
    async def agent(task: Any, session: Session) -> float:
        assert session.environment is not None
        await session.environment.step({"s": 1.2})
        return 1.0

    result = await play(agent, agent_idle_s=0.3)
    assert (result.outcome, result.attempts) == ("completed", 1)


async def test_a_slow_turn_is_no_stuck_agent_and_has_a_limit_of_its_own():
    async def agent(task: Any, session: Session) -> float:
        async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
            sampling: Any = {"ignore_eos": True}
            hi: Any = [{"role": "user", "content": "hi"}]
            await client.chat.completions.create(model="default", messages=hi, max_tokens=300, extra_body=sampling)
        return 1.0

    assert (await play(agent, agent_idle_s=0.3)).outcome == "completed"
    result = await play(agent, agent_idle_s=0.3, turn_timeout_s=0.5)
    assert (result.outcome, result.reward) == ("truncated", None)
    assert "turn 1 was not done within 0.5 s (trial.turn_timeout_s)" in result.cause


@pytest.mark.parametrize(
    ("cls", "outcome"), [("BadTask", "agent_failed"), ("EnvironmentLost", "env_failed"), ("ValueError", "agent_failed")]
)
async def test_what_an_agent_raises_says_whose_fault_it_was(cls: str, outcome: str):
    attempts: list[int] = []

    async def agent(task: Any, session: Session) -> float:
        attempts.append(session.attempt)
        raise type(cls, (Exception,), {})("no good")

    result = await play(agent, max_env_restarts=2)
    assert (result.outcome, result.reward) == (outcome, None)
    assert len(attempts) == {"BadTask": 1, "EnvironmentLost": 3, "ValueError": 2}[cls]
    assert "no good" in result.cause
