"""Trials from start to outcome, attempt by attempt.

Owns the loop: open, run the agent, ask what became of it, restart or record. The rules are in `policy`. Knows nothing
of Ray or engines: it is a client of the gateway like any harness.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from rollout_ft.clock import monotonic
from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest
from rollout_ft.trial.agents import Agent
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.policy import AttemptEnd, End, Finish, decide
from rollout_ft.types import JSON, Outcome


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A line of `trials.jsonl`."""

    trial_id: str
    task_id: str
    outcome: str
    reward: float | None
    cause: str
    attempts: int
    turns: int
    faults_survived: int
    tokens_generated: int
    tokens_reused: int
    tokens_wasted: int
    seconds: float

    def line(self) -> JSON:
        return asdict(self)


_log = logging.getLogger("rollout_ft")

OnResult = Callable[[TrialResult, JSON], None]
"""Told of each trial when it has ended, with its trajectory."""


class TrialRunner:
    def __init__(self, client: Client, agent: Agent, config: TrialConfig):
        self._client, self._agent, self._config = client, agent, config

    async def run(
        self, tasks: Sequence[JSON], *, concurrency: int, prefix: str = "", on_result: OnResult | None = None, release: bool = False
    ) -> list[TrialResult]:
        """All tasks, `concurrency` at a time; results in the order of the tasks.

        With `release` a trial is forgotten by the run once `on_result` has returned: it has put it on disk by then.
        """
        slots = asyncio.Semaphore(concurrency)

        async def one(task: JSON) -> TrialResult:
            async with slots:
                result, trajectory = await self._survived(task, prefix + str(task["task_id"]))
                if on_result is not None:
                    on_result(result, trajectory)
                    if release:
                        await self._release(result.trial_id)
                return result

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(task)) for task in tasks]
        return [task.result() for task in running]

    async def _release(self, trial_id: str) -> None:
        try:
            await self._client.release(trial_id)
        except BadRequest as e:
            _log.warning("trial.not_released trial=%s: %s", trial_id, e)

    async def _survived(self, task: JSON, trial_id: str) -> tuple[TrialResult, JSON]:
        """A trial whose run does not answer any more is an outcome, not the end of the others."""
        try:
            return await self.trial(task, trial_id)
        except BadRequest as e:
            outcome = Outcome.INFRA_EXHAUSTED.value
            lost = TrialResult(trial_id, str(task["task_id"]), outcome, None, str(e), 0, 0, 0, 0, 0, 0, 0.0)
            return lost, {"trial_id": trial_id, "paths": []}

    async def trial(self, task: JSON, trial_id: str) -> tuple[TrialResult, JSON]:
        """One trial to its outcome, and its trajectory."""
        began, restarts = monotonic(), 0
        fields = {k: task[k] for k in ("seed", "sampling", "group_id", "mode") if k in task}
        session = await self._client.open_session(
            trial_id=trial_id, task_id=str(task["task_id"]), recovery=self._config.recovery.value, **fields
        )
        while True:
            ended = await self._attempt(task, session)
            decision = decide(ended, restarts=restarts, max_restarts=self._config.max_restarts, recovery=self._config.recovery)
            if isinstance(decision, Finish):
                result = await self._finish(task, session, decision, restarts, monotonic() - began)
                return result, await session.trajectory()
            restarts += 1
            session = await self._client.restart(trial_id, session.attempt, decision.checkpoint)

    async def _attempt(self, task: JSON, session: Session) -> AttemptEnd:
        try:
            async with asyncio.timeout(self._config.attempt_timeout_s):
                ended = await self._agent.run(task, session)
        except TimeoutError:
            ended = AttemptEnd(End.TIMED_OUT, cause=f"no end within {self._config.attempt_timeout_s:g} s (trial.attempt_timeout_s)")
        trial = await self._client.trial(session.trial_id)
        return replace(ended, tainted=bool(trial["tainted"]), cause=ended.cause or trial["fault"])

    async def _finish(self, task: JSON, session: Session, end: Finish, restarts: int, seconds: float) -> TrialResult:
        trial = await self._client.outcome(session.trial_id, end.outcome.value, end.reward, end.cause, session.attempt)
        meta = trial["metadata"]
        survived = restarts + meta["generations"] - meta["turns_committed"] if end.outcome is not Outcome.INFRA_EXHAUSTED else 0
        return TrialResult(
            session.trial_id, str(task["task_id"]), end.outcome.value, end.reward, end.cause, session.attempt,
            meta["turns_in_trajectory"], survived, meta["tokens_generated"], meta["tokens_reused"],
            meta["tokens_wasted"], round(seconds, 3),
        )  # fmt: skip
