"""Drives one engine: call after call until a turn is finished.

Owns when the engine is called and how it is told to stop. Knows nothing of sessions or commits. Nothing is sent while
the gate is closed or without a place; whether a failure costs the turn anything is the ladder's to say.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial

from rollout_ft.clock import monotonic
from rollout_ft.config import EngineConfig
from rollout_ft.engine.admission import Admission, Place
from rollout_ft.engine.budgets import RetryBudget, Terms
from rollout_ft.engine.gate import Gate
from rollout_ft.engine.generation import Generation, Progress
from rollout_ft.engine.ladder import FULL, GiveUp, after_refusal, spent_error
from rollout_ft.engine.orphans import Orphans
from rollout_ft.engine.patience import Patience
from rollout_ft.engine.port import Engine
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.telemetry.events import Events

DEATH_IS_SEEN_S = 0.05


class Driver:
    def __init__(self, engine: Engine, config: EngineConfig, events: Events | None = None, luck: Callable[[], float] = random.random):
        self.engine, self._config, self._luck = engine, config, luck
        self._events = events or Events("driver")
        self.patience = Patience(config.first_token_timeout_s, config.token_timeout_s)
        self.gate = Gate(self.patience)
        self.admission = Admission(config.admission)
        self.orphans = Orphans(engine, lambda: self.admission.in_flight, self._events)
        retry = config.retry
        self._retries = RetryBudget(Terms(retry.share, retry.floor_per_s, retry.burst), monotonic())
        self._short = False
        self.last_progress = monotonic()
        self.lost = False
        """Nothing more is sent: the engine is being replaced."""

    async def run(self, generation: Generation, progress: Progress, began: float) -> None:
        """Generates until the turn is finished; `began` is when its trial did, wall clock.

        Raises EngineLost, Overloaded, or EngineRefused when the request is wrong or the turn's budget is spent.
        """
        most, refusals, retry = self._config.max_generations_per_turn, 0, generation.calls > 0
        while not generation.complete():
            if generation.calls >= most:
                raise spent_error(generation.calls)
            await self._affordable(retry)
            refused, excused = await self._call(generation, progress, began)
            if refused is None:
                return
            refusals = refusals + 1 if refused.status in (None, *FULL) else 0
            then = after_refusal(
                refused, excused=excused, spent=generation.calls, max_spent=most, refusals=refusals, config=self._config.retry,
                luck=self._luck(),
            )  # fmt: skip
            if isinstance(then, GiveUp):
                raise then.error
            retry = then.retry
            generation.calls -= not then.costs
            await asyncio.sleep(then.pause_s)

    async def _call(self, generation: Generation, progress: Progress, began: float) -> tuple[EngineRefused | None, bool]:
        """One call; what the engine refused, if it did, and whether it was closed meanwhile. Raises EngineLost, Overloaded."""
        while True:
            await self.gate.opened()
            async with self.admission.place(began) as place:
                if self.gate.closed:
                    continue  # while it waited
                closings = self.gate.closings
                try:
                    await generation.call(self.engine, self.patience, progress, partial(self._answered, place, closings))
                    return None, False
                except EngineLost as e:
                    if e.reason.startswith("stalled") and closings == self.gate.closings:
                        place.refused()
                    raise
                except EngineRefused as e:
                    if e.status in FULL:
                        place.refused()
                    return e, closings != self.gate.closings

    def _answered(self, place: Place, closings: int) -> None:
        if closings == self.gate.closings:  # the time of a pause is not the engine's
            place.answered()

    async def _affordable(self, retry: bool) -> None:
        """Returns when this call may be made: retries are a share of the traffic."""
        if not retry:
            return self._retries.called()
        wait_s = self._retries.retry(monotonic())
        if self._retries.spent and not self._short:
            self._events.emit("retries.spent", wait_s=round(wait_s, 3))
        self._short = self._retries.spent
        if wait_s:
            await asyncio.sleep(wait_s)

    async def is_lost(self, e: EngineLost) -> bool:
        """A stalled stream beside others that move is a lost request; without any progress it is a lost engine."""
        if self.lost:
            return True
        if e.reason.startswith("stalled"):
            return monotonic() - self.last_progress >= self.patience.token_s()
        await asyncio.sleep(DEATH_IS_SEEN_S)  # a killed process is reported a moment after its connections broke
        return self.lost or not await self.engine.alive()

    def abort(self, generation: Generation) -> None:
        """Nobody wants what the engine does for this turn any more; one that is lost is not asked."""
        if generation.rid and not generation.finish and not self.lost:
            self.orphans.bury(generation.rid)

    def aclose(self) -> None:
        self.orphans.aclose()
