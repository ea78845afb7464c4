"""The environment of one attempt, as its agent uses it.

Owns the environment that lives now, and its replacement. What is taken and what is served is for `trial.steps`. A step's result
reaches the agent when the checkpoint has it; a step that has begun is brought to its end and recorded though its agent be dead,
so that it is not done again.

The subtle invariant: an environment is made when a step has to be taken, and not before: one whose steps are all recorded is
never needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import orjson

from rollout_ft.clock import monotonic
from rollout_ft.errors import BadRequest
from rollout_ft.trial.agents import raised
from rollout_ft.trial.environment import Ability, Environment, EnvironmentLost, Factory
from rollout_ft.trial.policy import AttemptEnd, Blame, End
from rollout_ft.trial.steps import CatchUp, Due, Recorded, Steps, canonical, fitting
from rollout_ft.types import JSON

MAX_RUNNING = 256
"""Steps that an agent has taken at once."""
CLOSE_S = 5.0
"""How much longer than a step may take it is waited for when its agent is gone."""
KEPT_SNAPSHOTS = 2
_log = logging.getLogger("rollout_ft")


class Recorder(Protocol):
    """The attempt's session: what it has is what the checkpoint has. Raises BadRequest."""

    async def record_step(self, number: int, action: JSON, result: JSON, snapshot: str) -> Recorded: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """`record`: results go to the checkpoint, and are served from there; `every`: a snapshot after so many steps."""

    record: bool
    every: int
    step_timeout_s: float
    max_lost: int


@dataclass(slots=True)
class Counts:
    """What became of an attempt's steps. `again`: how many were taken that an earlier environment had taken."""

    taken: int = 0
    served: int = 0
    again: int = 0
    lost: int = 0
    """Environments that were lost."""


class Tools:
    def __init__(
        self, factory: Factory, task: JSON, trial_id: str, directory: Path, rules: Rules, recorder: Recorder,
        recorded: Sequence[Recorded], lost: int = 0,
    ):  # fmt: skip
        self._make = lambda: factory(task, trial_id, directory)
        self._rules, self._recorder, self._trial_id = rules, recorder, trial_id
        self._parts = self._make()
        self.ability = self._parts.ability
        self._environment: Environment | None = None
        self._recorded = list(recorded)
        self._steps = Steps(trial_id, self.ability, recorded)
        self._snapshots = [step.snapshot for step in recorded if step.snapshot]
        self._gone = frozenset[str]()
        self._order, self._making = asyncio.Lock(), asyncio.Lock()
        self._running = set[asyncio.Task[JSON]]()
        self._lost_before, self._closed, self._changed = lost, False, monotonic()
        self.counts = Counts()
        self.failed: AttemptEnd | None = None
        """How the attempt has ended, whatever its agent makes of it: it has no environment any more, or no record of it."""

    @property
    def busy(self) -> bool:
        """A step is being taken: the agent waits for it."""
        return bool(self._running)

    @property
    def quiet_s(self) -> float:
        """Since a step last began or ended."""
        return monotonic() - self._changed

    def begin_at(self, number: int) -> None:
        """The first `number` recorded steps lie behind the agent already: it starts from the checkpoint's messages. Raises
        ValueError once it has taken a step: the environment is where that left it."""
        if self._running or self.counts.taken or self.counts.served:
            raise ValueError("an agent starts from the checkpoint's messages before its first step, or not at all")
        self._steps = Steps(self._trial_id, self.ability, self._recorded, min(number, len(self._recorded)))

    async def step(self, action: JSON) -> JSON:
        """What the action does to the environment, or did. Raises ValueError for what is no action, EnvironmentLost when there is no
        environment any more."""
        fitting(action)
        self._check_open()
        if len(self._running) >= MAX_RUNNING:
            raise ValueError(f"{MAX_RUNNING} steps of this trial are being taken: wait for one of them")
        self._changed = monotonic()
        task = asyncio.create_task(self._step(action))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _check_open(self) -> None:
        if self.failed is not None:
            raise EnvironmentLost(self.failed.cause)
        if self._closed:
            raise EnvironmentLost("the attempt is over")

    def _ended(self, task: asyncio.Task[JSON]) -> None:
        self._running.discard(task)
        self._changed = monotonic()
        _ = task.cancelled() or task.exception()

    async def _step(self, action: JSON) -> JSON:
        if self.ability is Ability.STATELESS:
            return await self._due(action)
        async with self._order:
            return await self._due(action)

    async def _due(self, action: JSON) -> JSON:
        """A step that fails in between leaves the record without it: nothing may come behind it."""
        self._check_open()
        due = self._steps.due(action)
        if due.recorded is not None:
            self.counts.served += 1
            return due.recorded.result
        try:
            step = await self._recorded_step(action, due)
        except EnvironmentLost:
            raise
        except Exception as e:
            self.failed = self.failed or _failed(e)
            raise EnvironmentLost(self.failed.cause) from e
        return step.result

    async def _recorded_step(self, action: JSON, due: Due) -> Recorded:
        result, snapshot = await self._taken(action, due)
        step = Recorded(0, due.number, canonical(action), result, snapshot)
        if self._rules.record:
            step = await self._recorder.record_step(due.number, action, result, snapshot)
        self._steps.add(step)
        self.counts.taken += 1
        if snapshot:
            self._snapshots.append(snapshot)
            await self._forget(self._snapshots[:-KEPT_SNAPSHOTS])
        return step

    async def _taken(self, action: JSON, due: Due) -> tuple[JSON, str]:
        """The result, and the snapshot behind it; from as many environments as it takes and may take."""
        while True:
            self._check_open()
            environment: Environment | None = None
            try:
                environment = await self._living()
                result = await self._within(environment, action, due.key)
                return result, await self._saved(environment, due.number)
            except EnvironmentLost as e:
                await self._replace(environment, e)

    async def _within(self, environment: Environment, action: JSON, key: str) -> JSON:
        limit = asyncio.timeout(self._rules.step_timeout_s)
        try:
            async with limit:
                return orjson.loads(fitting(await environment.step(action, key)))
        except EnvironmentLost:
            raise
        except Exception as e:
            if limit.expired():
                raise EnvironmentLost(f"a step took more than {self._rules.step_timeout_s:g} s (trial.tool_timeout_s)") from None
            _log.warning("trial %s: its environment raised", self._trial_id, exc_info=True)
            return {"error": f"{type(e).__name__}: {e}"[:2000]}

    async def _saved(self, environment: Environment, number: int) -> str:
        """The snapshot behind a step. Without it the step is taken again where it would have been of use."""
        if self.ability is not Ability.EXPORT_RESTORE or number % self._rules.every or not self._rules.record:
            return ""
        try:
            async with asyncio.timeout(self._rules.step_timeout_s):
                return await environment.snapshot()
        except Exception as e:
            _log.warning("trial %s: no snapshot behind step %d: %s", self._trial_id, number, e)
            return ""

    async def _living(self) -> Environment:
        """The environment, in the state in which the step that is due begins; a new one where there is none."""
        async with self._making:
            self._check_open()
            while self._environment is None:
                environment, way = self._make(), self._steps.catch_up(self._gone)
                try:
                    if await self._began(environment, way):
                        for key, action in way.actions:
                            await self._within(environment, action, key)
                            self.counts.again += 1
                        self._environment = environment
                except BaseException:
                    await self._stop(environment)
                    raise
            return self._environment

    async def _began(self, environment: Environment, way: CatchUp) -> bool:
        """Whether it is in the state that `way` begins with. A snapshot that cannot be gone on from is not tried again."""
        try:
            async with asyncio.timeout(self._rules.step_timeout_s):
                await (environment.restore(way.snapshot) if way.snapshot else environment.start())
            return True
        except (EnvironmentLost, OSError) as e:  # a timeout is one
            why = str(e) or "it is too slow (trial.tool_timeout_s)"
            if not way.snapshot:
                raise EnvironmentLost(f"it could not be started: {why}") from e
            _log.warning("trial %s: snapshot %s cannot be gone on from: %s", self._trial_id, way.snapshot, why)
            self._gone |= {way.snapshot}
            await self._stop(environment)
            return False

    async def _replace(self, environment: Environment | None, why: EnvironmentLost) -> None:
        """Another takes its place, unless one has already: several steps may see the same one lost."""
        if environment is not None:
            if self._environment is not environment:
                return
            self._environment = None
            await self._stop(environment)
        if self._closed:
            return
        self.counts.lost += 1
        _log.warning("trial %s: its environment is lost: %s", self._trial_id, why)
        if self._lost_before + self.counts.lost > self._rules.max_lost:
            cause = f"{why}; {self._rules.max_lost} environments were replaced (trial.max_env_restarts)"
            self.failed = self.failed or AttemptEnd(End.RAISED, cause=cause, blame=Blame.ENVIRONMENT)

    async def _stop(self, environment: Environment) -> None:
        try:
            async with asyncio.timeout(self._rules.step_timeout_s):
                await environment.stop()
        except Exception:
            _log.warning("trial %s: its environment could not be stopped", self._trial_id, exc_info=True)

    async def _forget(self, snapshots: list[str]) -> None:
        for snapshot in snapshots:
            self._snapshots.remove(snapshot)
            self._gone |= {snapshot}
            try:
                async with asyncio.timeout(self._rules.step_timeout_s):
                    await self._parts.forget(snapshot)
            except Exception:
                _log.warning("trial %s: snapshot %s could not be removed", self._trial_id, snapshot, exc_info=True)

    async def close(self) -> None:
        """The attempt is over: what runs comes to its end, if it does in time, nothing begins, and the environment is stopped."""
        self._closed = True
        if self._running:
            running = set(self._running)
            await asyncio.wait(running, timeout=self._rules.step_timeout_s + CLOSE_S)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        environment, self._environment = self._environment, None
        if environment is not None:
            await self._stop(environment)

    async def forget(self) -> None:
        """The trial is over, or starts from nothing: its snapshots are of no use."""
        await self._forget(list(self._snapshots))


def _failed(e: Exception) -> AttemptEnd:
    """The end of an attempt that can have no further step."""
    ended = raised(e)
    otherwise = Blame.INFRA if isinstance(e, BadRequest) else Blame.ENVIRONMENT
    return ended if ended.blame is not Blame.AGENT else replace(ended, blame=otherwise)
