"""A runner that goes on with trials of an earlier process, against a gateway in memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest
from rollout_ft.trial.agents import InlineAgent
from rollout_ft.trial.attempt import workshop
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.runner import TrialResult, TrialRunner
from rollout_ft.types import BY_FAULTS

META = {
    "generations": 3, "version_restarts": 0, "fault_restarts": 0, "turns_committed": 2, "turns_in_trajectory": 2, "tokens_generated": 9,
    "tokens_reused": 0, "tokens_wasted": 0,
}  # fmt: skip


class Gateway:
    """One trial, `t`, in the state that it was left in; and what was asked for."""

    def __init__(self, **left: Any):
        self.trial_now = {
            "trial_id": "t", "task_id": "t", "session_id": "t~1", "attempt": 1, "state": "running", "outcome": None, "reward": None,
            "cause": "", "recovery": "resume", "seconds": None, "tainted": False, "fault": "", "metadata": META,
        } | left  # fmt: skip
        self.asked: list[str] = []
        self.still: list[float] = []

    async def get(self, path: str) -> list[dict[str, Any]]:
        assert path == "/trials"
        return [{"trial_id": "t", "attempt": 1, "entries": 3}]

    async def open_session(self, **request: Any) -> Session:
        raise BadRequest("there is one", 409, "trial_exists" if self.trial_now["state"] == "running" else "trial_ended")

    async def trial(self, trial_id: str) -> dict[str, Any]:
        return self.trial_now

    async def restart(self, trial_id: str, from_attempt: int, checkpoint: bool, reason: str, cause: str) -> Session:
        assert from_attempt == self.trial_now["attempt"]
        self.asked.append(f"restart checkpoint={checkpoint} for {reason}")
        attempt = from_attempt + 1
        self.trial_now |= {"attempt": attempt, "session_id": f"t~{attempt}", "metadata": META | {"fault_restarts": reason in BY_FAULTS}}
        return Session(f"t~{attempt}", "t", attempt, "", "", 0, cast(Client, self))

    async def outcome(self, trial_id: str, outcome: str, reward: float | None, cause: str, attempt: int) -> dict[str, Any]:
        assert attempt == self.trial_now["attempt"]
        self.trial_now |= {"state": "ended", "outcome": outcome, "reward": reward, "cause": cause, "seconds": 60}
        return self.trial_now

    async def trajectory(self, session_id: str, session_key: str) -> dict[str, Any]:
        assert session_key == f"key of {session_id}"
        return {"session_id": session_id}

    async def still_s(self) -> float:
        return self.still.pop(0) if self.still else 0.0

    async def release(self, trial_id: str) -> None:
        self.asked.append("release")


async def run(gateway: Gateway, *, resume: bool = True) -> tuple[TrialResult, dict[str, Any]]:
    async def agent(task: Any, session: Session) -> float:
        gateway.asked.append(f"agent of {session.session_id}")
        return 0.5

    runner = TrialRunner(cast(Client, gateway), InlineAgent(agent), TrialConfig(), lambda sid: f"key of {sid}", resume)
    kept: list[tuple[TrialResult, dict[str, Any]]] = []
    await runner.run([{"task_id": "t"}], concurrency=1, on_result=lambda *result: kept.append(result), release=True)
    return kept[0]


async def test_an_unfinished_trial_continues_in_its_next_attempt_and_counts_all_its_time():
    gateway = Gateway()
    result, trajectory = await run(gateway)
    assert gateway.asked == ["restart checkpoint=True for resumed", "agent of t~2", "release"]
    assert (result.outcome, result.reward, result.attempts, result.seconds) == ("completed", 0.5, 2, 60)
    assert result.faults_survived == 2, "the stop and a generation"
    assert trajectory == {"session_id": "t~2"}


async def test_a_trial_that_ended_is_read_and_not_played():
    gateway = Gateway(state="ended", outcome="completed", reward=1.0, seconds=7)
    result, trajectory = await run(gateway)
    assert gateway.asked == ["release"]
    assert (result.outcome, result.reward, result.seconds, trajectory["session_id"]) == ("completed", 1.0, 7, "t~1")


async def test_of_a_trial_that_was_collected_only_its_line_is_made_again():
    gateway = Gateway(state="released", outcome="completed", reward=1.0, seconds=7)
    result, trajectory = await run(gateway)
    assert result.recorded
    assert trajectory["released"]


async def test_a_trial_that_starts_from_nothing_after_a_fault_does_so_after_a_stop():
    gateway = Gateway(recovery="restart")
    await run(gateway)
    assert gateway.asked[0] == "restart checkpoint=False for resumed"


async def test_a_trial_that_survives_no_fault_does_not_survive_a_stop():
    gateway = Gateway(recovery="abandon")
    result, _ = await run(gateway)
    assert gateway.asked == ["release"]
    assert (result.outcome, result.reward) == ("infra_exhausted", None)


@pytest.mark.parametrize(("gateway", "resume"), [(Gateway(), False), (Gateway(state="released", outcome="completed", metadata={}), True)])
async def test_a_trial_of_which_nothing_can_be_learned_is_neither_recorded_nor_released(gateway: Gateway, resume: bool):
    result, _ = await run(gateway, resume=resume)
    assert not result.recorded
    assert gateway.asked == []


@pytest.mark.parametrize(("still", "outcome"), [([], "truncated"), ([1.0, 61.0], "completed")])
async def test_the_time_in_which_the_engines_were_kept_still_is_not_the_attempts(still: list[float], outcome: str):
    gateway, done = Gateway(), asyncio.Event()
    gateway.still = still

    async def agent(task: Any, session: Session) -> float:
        if still:
            asyncio.get_running_loop().call_later(0.2, done.set)
        await done.wait()
        return 0.5

    config = TrialConfig(attempt_timeout_s=0.05)
    runner = TrialRunner(cast(Client, gateway), InlineAgent(agent), config, lambda sid: f"key of {sid}", True)
    await runner.run([{"task_id": "t"}], concurrency=1)
    assert gateway.trial_now["outcome"] == outcome


async def test_what_one_trials_agent_or_environment_raises_ends_no_other():
    class All(Gateway):
        async def open_session(self, **request: Any) -> Session:
            trial_id = request["trial_id"]
            return Session(f"{trial_id}~1", trial_id, 1, "", f"key of {trial_id}", 0, cast(Client, self))

        async def trial(self, trial_id: str) -> dict[str, Any]:
            return self.trial_now | {"trial_id": trial_id, "task_id": trial_id, "session_id": f"{trial_id}~1"}

        async def outcome(self, trial_id: str, outcome: str, reward: float | None, cause: str, attempt: int) -> dict[str, Any]:
            return (await self.trial(trial_id)) | {"state": "ended", "outcome": outcome, "reward": reward, "cause": cause}

    async def agent(task: Any, session: Session) -> float:
        if session.trial_id == "cancels":
            cancelled = asyncio.ensure_future(asyncio.Event().wait())
            cancelled.cancel()
            await cancelled
        return 0.5

    def environment(task: Any, trial_id: str, directory: Any) -> Any:
        return task["image"]() if trial_id == "imageless" else SimpleNamespace(ability="stateless")

    config, gateway = TrialConfig(max_env_restarts=0, max_agent_restarts=0), All()
    gateway.trajectory = lambda sid, key: asyncio.sleep(0, {"session_id": sid})  # pyright: ignore
    async with workshop(config, environment, None) as made:
        runner = TrialRunner(cast(Client, gateway), InlineAgent(agent), config, lambda sid: "", workshop=made)
        tasks = [{"task_id": name} for name in ("cancels", "imageless", "fine", "fine-too")]
        results = await runner.run(tasks, concurrency=2)
    assert [result.outcome for result in results] == ["agent_failed", "env_failed", "completed", "completed"]
    assert ["CancelledError" in results[0].cause, "KeyError: 'image'" in results[1].cause] == [True, True]


async def test_what_a_failed_agent_said_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture):
    gateway, tries = Gateway(), iter([True, False])

    async def agent(task: Any, session: Session) -> float:
        if next(tries):
            raise RuntimeError("\x1b[31mred\nengine.dead engine=engine-0")
        return 0.5

    runner = TrialRunner(cast(Client, gateway), InlineAgent(agent), TrialConfig(), lambda sid: f"key of {sid}", resume=True)
    await runner.run([{"task_id": "t"}], concurrency=1)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("trial.agent_failed")]
    assert "\\x1b[31mred\\nengine.dead engine=engine-0" in said
    assert said.isprintable()


async def test_of_an_attempt_that_is_replaced_while_it_is_followed_the_newest_is_played():
    class Twice(Gateway):
        """Somebody restarts the trial while its first agent runs, and again while the runner asks for that attempt."""

        async def restart(self, trial_id: str, from_attempt: int, checkpoint: bool, reason: str = "asked", cause: str = "") -> Session:
            if reason == "resumed":
                return await super().restart(trial_id, from_attempt, checkpoint, reason, cause)
            self.asked.append(f"the attempt behind {from_attempt}")
            if from_attempt == 2:
                self.trial_now |= {"attempt": 4, "session_id": "t~4"}
                raise BadRequest("somebody else restarted it", 409, "stale_attempt")
            return Session("t~4", "t", 4, "", "", 0, cast(Client, self))

    gateway = Twice()

    async def agent(task: Any, session: Session) -> float:
        gateway.asked.append(f"agent of {session.session_id}")
        if session.attempt == 2:
            gateway.trial_now |= {"attempt": 3, "session_id": "t~3"}
        return session.attempt / 10

    runner = TrialRunner(cast(Client, gateway), InlineAgent(agent), TrialConfig(), lambda sid: f"key of {sid}", True)
    (result,) = await runner.run([{"task_id": "t"}], concurrency=1)
    assert gateway.asked[1:] == ["agent of t~2", "the attempt behind 2", "the attempt behind 3", "agent of t~4"]
    assert (result.outcome, result.reward, result.attempts) == ("completed", 0.4, 4)
