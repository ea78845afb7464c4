"""Trials from start to outcome, attempt by attempt.

Owns the loop: open, or go on with what an earlier process opened; run the agent, ask what became of it, restart or
record. The rules are in `policy`. Knows nothing of Ray or engines: it is a client of the gateway like any harness.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, replace

from rollout_ft.clock import monotonic, wall
from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest
from rollout_ft.telemetry.account import faults_survived
from rollout_ft.telemetry.words import on_one_line
from rollout_ft.trial.agents import Agent
from rollout_ft.trial.attempt import Attempts, Workshop
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.groups import LOST, GroupResult
from rollout_ft.trial.policy import Finish, Restart, Spent, decide, resumed
from rollout_ft.trial.schedule import Schedule
from rollout_ft.trial.siblings import Play, plays
from rollout_ft.trial.tools import Tools
from rollout_ft.types import JSON, Outcome, Recovery


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
    divergences: int = 0
    """Requests of its replays that were not the recorded ones."""
    group_id: str = ""

    def line(self) -> JSON:
        return asdict(self)

    def event(self) -> JSON:
        """`trial.ended`, where the store's summary of the trial is not at hand."""
        told = {name: value for name, value in self.line().items() if name not in ("trial_id", "task_id", "group_id", "divergences")}
        whose = {"trial": self.trial_id, "task": self.task_id, "group": self.group_id}
        return {
            "time": wall(),
            "event": "trial.ended",
            "source": "run",
            **whose,
            **told,
            "tokens_wasted_by": {"unknown": self.tokens_wasted},
        }

    @property
    def recorded(self) -> bool:
        """Whether the store has this outcome; a trial of which nothing could be learned is not over."""
        return self.attempts > 0

    @property
    def lost(self) -> bool:
        """Whether it says nothing of the model: it has no part in its group."""
        return not self.recorded or self.outcome in LOST


_log = logging.getLogger("rollout_ft")

OnResult = Callable[[TrialResult, JSON], None]
"""Told of each trial when it has ended, with its trajectory; `{"released": true}` for one that was collected before."""
OnGroup = Callable[[GroupResult], None]
"""Told of each group when it is decided, after the last trial that this needed."""


class TrialRunner:
    """`session_key` derives a session's key from its id. With `resume`, trials that exist are gone on with: those that have
    ended are read, the others continue from their checkpoint; without it they are an error."""

    def __init__(
        self, client: Client, agent: Agent, config: TrialConfig, session_key: Callable[[str], str], resume: bool = False,
        workshop: Workshop | None = None,
    ):  # fmt: skip
        self._client, self._config = client, config
        self._session_key, self._resume = session_key, resume
        self._attempts = Attempts(client, agent, config, workshop)

    async def run(
        self, tasks: Sequence[JSON], *, concurrency: int, prefix: str = "", on_result: OnResult | None = None, release: bool = False,
        on_group: OnGroup | None = None, earlier: Sequence[TrialResult] = (),
    ) -> list[TrialResult]:  # fmt: skip
        """All tasks, `concurrency` at a time; results in the order of the tasks, and of a task in that of its trials.

        With `release` a trial is forgotten by the run once `on_result` has returned: it has put it on disk by then.
        `earlier` are results of another process, in the order in which they came: they count, and are not played again.
        """
        results, came = {r.trial_id: r for r in earlier}, [(r.trial_id, r.lost, r.reward) for r in earlier]
        schedule = Schedule(plays(tasks, self._config, prefix), self._config, concurrency, came, await self._begun())
        tell: OnGroup = on_group or (lambda decided: None)

        async def one(play: Play) -> None:
            result, trajectory = await self._survived(play.task, play.trial_id)
            result = results[play.trial_id] = replace(result, group_id=play.group_id)
            if on_result is not None:
                on_result(result, trajectory)
                if release and result.recorded:
                    await self._release(result.trial_id)
            decided = schedule.ended(play, lost=result.lost, reward=result.reward)
            if decided is not None:
                tell(decided)
            fill()

        def fill() -> None:
            while (play := schedule.next()) is not None:
                running.create_task(one(play))

        for decided in schedule.board.decided:
            tell(decided)
        async with asyncio.TaskGroup() as running:
            fill()
        return [results.get(play.trial_id) or _not_played(play) for play in schedule.board.plays]

    async def _begun(self) -> Container[str]:
        """The trials of an earlier process that the run knows."""
        try:
            return {trial["trial_id"] for trial in await self._client.get("/trials")} if self._resume else ()
        except BadRequest as e:
            _log.warning("trials.not_listed: %s", e)
            return ()

    async def _release(self, trial_id: str) -> None:
        try:
            await self._client.release(trial_id)
        except BadRequest as e:
            _log.warning("trial.not_released trial=%s: %s", trial_id, e)

    async def _survived(self, task: JSON, trial_id: str) -> tuple[TrialResult, JSON]:
        """A trial whose run does not answer any more is an outcome, not the end of the others."""
        try:
            return await self.trial(task, trial_id)
        except Exception as e:  # whatever it is, the others go on
            if not isinstance(e, BadRequest):
                _log.exception("trial.unrecorded trial=%s", trial_id)
            outcome = Outcome.INFRA_EXHAUSTED.value
            lost = TrialResult(trial_id, str(task["task_id"]), outcome, None, str(e), 0, 0, 0, 0, 0, 0, 0.0)
            return lost, {"trial_id": trial_id, "paths": []}

    async def trial(self, task: JSON, trial_id: str) -> tuple[TrialResult, JSON]:
        """One trial to its outcome, and its trajectory."""
        began = monotonic()
        fields = {k: task[k] for k in ("seed", "sampling", "group_id", "mode") if k in task}
        try:
            session = await self._client.open_session(
                trial_id=trial_id, task_id=str(task["task_id"]), recovery=self._config.recovery.value, **fields
            )
        except BadRequest as e:
            if not self._resume or e.code not in ("trial_exists", "trial_ended"):
                raise
            trial = await self._continued(task, await self._client.trial(trial_id))
            return result_of(trial, trial["seconds"]), await self._trajectory(trial)
        trial = await self._play(task, session)
        return result_of(trial, monotonic() - began), await self._trajectory(trial)

    async def _trajectory(self, trial: JSON) -> JSON:
        if trial["state"] == "released":
            return {"trial_id": trial["trial_id"], "paths": [], "released": True}
        sid = trial["session_id"]
        return await self._client.trajectory(sid, self._session_key(sid))

    async def _continued(self, task: JSON, trial: JSON) -> JSON:
        """A trial of an earlier process, brought to its end if it has none."""
        if trial["state"] == "released" and not trial["metadata"]:
            raise BadRequest(f"trial {trial['trial_id']} was collected, and nothing more is known of it", 409, "released")
        if trial["state"] != "running":
            await self._attempts.over(trial["trial_id"], None)
            return trial
        decision = resumed(Recovery(trial["recovery"]))
        if isinstance(decision, Finish):
            await self._attempts.over(trial["trial_id"], None)
            return await self._end(trial["trial_id"], trial["attempt"], decision)
        return await self._play(
            task, await self._client.restart(trial["trial_id"], trial["attempt"], decision.checkpoint, "resumed", decision.cause)
        )

    async def _play(self, task: JSON, session: Session) -> JSON:
        """Attempt after attempt, to the outcome; what the store then has of the trial."""
        spent = Spent()
        while True:
            ended, tools = await self._attempts.run(task, session, spent.environment)
            trial = await self._client.trial(session.trial_id)
            if trial["state"] != "running":  # somebody else ended it, while the agent went on
                await self._attempts.over(session.trial_id, tools)
                return trial
            spent = replace(spent, environment=spent.environment + (tools.counts.lost if tools else 0))
            if trial["attempt"] > session.attempt:
                session = await self._newer(session.trial_id)
                continue
            ended = replace(ended, tainted=bool(trial["tainted"]), cause=ended.cause or trial["fault"], fault=trial["fault"])
            decision = decide(ended, spent, self._config)
            try:
                if isinstance(decision, Finish):
                    over = await self._end(session.trial_id, session.attempt, decision)
                    await self._attempts.over(session.trial_id, tools)
                    return over
                following = await self._again(session, decision, tools, ended.cause)
            except BadRequest as e:
                if e.code != "stale_attempt":
                    raise
                session = await self._newer(session.trial_id)
            else:
                session, spent = following, spent.and_one(decision.spends)

    async def _again(self, session: Session, decision: Restart, tools: Tools | None, cause: str) -> Session:
        if decision.spends == "agent":
            _log.warning("trial.agent_failed trial=%s attempt=%d: %s", session.trial_id, session.attempt, on_one_line(cause))
        if tools is not None and not decision.checkpoint:
            await tools.forget()
        return await self._client.restart(session.trial_id, session.attempt, decision.checkpoint, decision.spends, decision.cause)

    async def _newer(self, trial_id: str) -> Session:
        """The session of an attempt that somebody else asked for while the agent of another went on, whose end is nothing to the trial:
        it costs no restart, and is no outcome. Of one that is asked for meanwhile, that one's."""
        while True:
            trial = await self._client.trial(trial_id)
            try:
                return await self._client.restart(trial_id, trial["attempt"] - 1, True)
            except BadRequest as e:
                if e.code != "stale_attempt":
                    raise

    async def _end(self, trial_id: str, attempt: int, end: Finish) -> JSON:
        return await self._client.outcome(trial_id, end.outcome.value, end.reward, end.cause, attempt)


def _not_played(play: Play) -> TrialResult:
    cause, outcome = f"not played: its group {play.group_id} was decided without it", Outcome.CANCELLED.value
    return TrialResult(play.trial_id, str(play.task["task_id"]), outcome, None, cause, 0, 0, 0, 0, 0, 0, 0.0, group_id=play.group_id)


def result_of(trial: JSON, seconds: float) -> TrialResult:
    """The result of a trial that has ended, from what the store has of it."""
    meta = trial["metadata"]
    return TrialResult(
        trial["trial_id"], trial["task_id"], trial["outcome"], trial["reward"], trial["cause"], trial["attempt"],
        meta["turns_in_trajectory"], faults_survived(trial), meta["tokens_generated"],
        meta["tokens_reused"], meta["tokens_wasted"], round(seconds, 3), meta.get("divergences", 0),
    )  # fmt: skip
