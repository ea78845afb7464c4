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
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson

from rollout_ft.trial.environment import Ability, Environment, EnvironmentLost, Factory
from rollout_ft.trial.steps import Due, Recorded, Steps, canonical
from rollout_ft.types import JSON

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
        self._environment: Environment | None = None
        self._parts = self._make()
        self.ability = self._parts.ability
        self._recorded = list(recorded)
        self._steps = Steps(trial_id, self.ability, recorded)
        self._snapshots = [step.snapshot for step in recorded if step.snapshot]
        self._gone = frozenset[str]()
        self._lock = asyncio.Lock()
        self._running = set[asyncio.Task[JSON]]()
        self._lost_before = lost
        self.counts = Counts()
        self.lost = ""
        """Why there is no environment any more, whatever the agent makes of it."""

    @property
    def busy(self) -> bool:
        """A step is being taken: the agent waits for it."""
        return bool(self._running)

    def begin_at(self, number: int) -> None:
        """The first `number` recorded steps lie behind the agent already: it starts from the checkpoint's messages."""
        self._steps = Steps(self._trial_id, self.ability, self._recorded, number)

    async def step(self, action: JSON) -> JSON:
        """What the action does to the environment, or did. Raises ValueError for what is no action, EnvironmentLost when there is no
        environment any more."""
        canonical(action)
        task = asyncio.create_task(self._step(action))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[JSON]) -> None:
        self._running.discard(task)
        _ = task.cancelled() or task.exception()

    async def _step(self, action: JSON) -> JSON:
        if self.ability is Ability.STATELESS:
            return await self._due(action, self._steps.due(action))
        async with self._lock:
            return await self._due(action, self._steps.due(action))

    async def _due(self, action: JSON, due: Due) -> JSON:
        if due.recorded is not None:
            self.counts.served += 1
            return due.recorded.result
        result, snapshot = await self._taken(action, due)
        step = Recorded(0, due.number, canonical(action), result, snapshot)
        if self._rules.record:
            step = await self._recorder.record_step(due.number, action, result, snapshot)
        self._steps.add(step)
        self.counts.taken += 1
        if snapshot:
            self._snapshots.append(snapshot)
            await self._forget(self._snapshots[:-KEPT_SNAPSHOTS])
        return step.result

    async def _taken(self, action: JSON, due: Due) -> tuple[JSON, str]:
        """The result, and the snapshot behind it; from as many environments as it takes and may take."""
        while True:
            if self.lost:
                raise EnvironmentLost(self.lost)
            try:
                environment = self._environment or await self._caught_up()
                result = await self._within(environment, action, due.key)
                return result, await self._saved(environment, due.number)
            except EnvironmentLost as e:
                await self._replace(e)

    async def _within(self, environment: Environment, action: JSON, key: str) -> JSON:
        try:
            async with asyncio.timeout(self._rules.step_timeout_s):
                return orjson.loads(canonical(await environment.step(action, key)))
        except TimeoutError:
            raise EnvironmentLost(f"a step took more than {self._rules.step_timeout_s:g} s (trial.tool_timeout_s)") from None
        except EnvironmentLost:
            raise
        except Exception as e:
            _log.warning("trial %s: its environment raised", self._trial_id, exc_info=True)
            return {"error": f"{type(e).__name__}: {e}"[:2000]}

    async def _saved(self, environment: Environment, number: int) -> str:
        """The snapshot behind a step. Without it the step is taken again where it would have been of use."""
        if self.ability is not Ability.EXPORT_RESTORE or number % self._rules.every or not self._rules.record:
            return ""
        try:
            return await environment.snapshot()
        except OSError as e:
            _log.warning("trial %s: no snapshot behind step %d: %s", self._trial_id, number, e)
            return ""

    async def _caught_up(self) -> Environment:
        """A new environment in the state in which the step that is due begins."""
        environment, way = self._make(), self._steps.catch_up(self._gone)
        self._environment = environment
        try:
            async with asyncio.timeout(self._rules.step_timeout_s):
                await (environment.restore(way.snapshot) if way.snapshot else environment.start())
        except (EnvironmentLost, OSError) as e:  # a timeout is one
            self._gone |= {way.snapshot}
            raise EnvironmentLost(
                f"it could not be {'restored' if way.snapshot else 'started'}: {e or 'too slow (trial.tool_timeout_s)'}"
            ) from e
        for key, action in way.actions:
            await self._within(environment, action, key)
            self.counts.again += 1
        return environment

    async def _replace(self, why: EnvironmentLost) -> None:
        self.counts.lost += 1
        _log.warning("trial %s: its environment is lost: %s", self._trial_id, why)
        if self._lost_before + self.counts.lost > self._rules.max_lost:
            self.lost = f"{why}; {self._rules.max_lost} environments were replaced (trial.max_env_restarts)"
        await self._stop()

    async def _stop(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None:
            try:
                await environment.stop()
            except Exception:
                _log.warning("trial %s: its environment could not be stopped", self._trial_id, exc_info=True)

    async def _forget(self, snapshots: list[str]) -> None:
        for snapshot in snapshots:
            await self._parts.forget(snapshot)
            self._snapshots.remove(snapshot)
            self._gone |= {snapshot}

    async def close(self) -> None:
        """The attempt is over: what runs comes to its end, if it does in time, and the environment is stopped."""
        if self._running:
            await asyncio.wait(self._running, timeout=self._rules.step_timeout_s + CLOSE_S)
            for task in self._running:
                task.cancel()
        await self._stop()

    async def forget(self) -> None:
        """The trial is over: its snapshots are of no use."""
        await self._forget(list(self._snapshots))
