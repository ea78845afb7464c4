"""Drives one engine: call after call until a turn is finished.

Owns when the engine is called, how it is told to stop, and what is held against it. Knows nothing of sessions or commits.
Nothing is sent while the gate is closed or without a place; whether a failure costs the turn anything is the ladder's to
say. An engine is given up on suspicion only when the overseer agrees; until then what runs on it waits.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from rollout_ft.config import EngineConfig
from rollout_ft.engine.admission import Admission
from rollout_ft.engine.canary import Canary, Probe
from rollout_ft.engine.evidence import Doubt, Evidence, of_status, weigh
from rollout_ft.engine.gate import Closed, Gate
from rollout_ft.engine.generation import Generation, Progress, VersionsMixed
from rollout_ft.engine.ladder import GiveUp, after_refusal
from rollout_ft.engine.pace import Floors, Pace
from rollout_ft.engine.patience import ALONE, STALLED, Patience
from rollout_ft.engine.port import Engine
from rollout_ft.errors import EngineLost, EngineRefused

DEATH_IS_SEEN_S = 0.05
PROBE_PAUSE_S = 0.2
SPARED_PAUSE_S = 2.0
FAILED = "failed: "


class Overseer(Protocol):
    """Who sees more than one engine."""

    async def may_lose(self, reason: str) -> bool:
        """Whether the engine may be given up on suspicion."""
        ...

    def doubted(self, reason: str) -> None:
        """The engine is in doubt; with no reason, it no longer is."""
        ...


class Alone:
    """The overseer of an engine that nobody replaces."""

    async def may_lose(self, reason: str) -> bool:
        return True

    def doubted(self, reason: str) -> None:
        return None


class Driver:
    def __init__(self, engine: Engine, config: EngineConfig):
        self.engine, self._config = engine, config
        c = config
        floors = Floors(c.first_token_timeout_s, c.token_timeout_s, c.compile_timeout_s, c.max_timeout_s, c.timeout_factor)
        self.patience = Patience(Pace(floors), self._may_lose_stalled)
        self.gate = Gate(self.patience)
        self.admission = Admission()
        self.canary = Canary(engine, config, self.gate, self.patience)
        self.overseer: Overseer = Alone()
        self._doubt = Doubt()
        self.lost = False
        """Nothing more is sent: the engine is being replaced."""

    async def run(self, generation: Generation, progress: Progress, began: float) -> None:
        """Generates until the turn is finished; `began` is when its trial did, wall clock.

        Raises EngineLost, or EngineRefused when the request is wrong or the turn's budget of failures is spent.
        """
        failures = 0
        while not generation.complete():
            await self.gate.opened()
            async with self.admission.place(began):
                closings = self.gate.closings
                try:
                    await generation.call(self.engine, self.patience, progress)
                    return
                except VersionsMixed:
                    await self.abort(generation)
                    generation.excuse()
                    generation.begin_anew()
                    continue
                except EngineRefused as e:
                    excused = closings != self.gate.closings
                    next_step = after_refusal(e, excused=excused, failures=failures, max_failures=self._config.max_generations_per_turn)
                    evidence = Evidence.REFUSED if excused else of_status(e.status)
                    self._weigh(evidence, str(e))
            if isinstance(next_step, GiveUp):
                raise next_step.error
            if evidence is Evidence.FAILED and self._doubt.lost(self._config.dead_after):
                raise EngineLost("", f"{FAILED}{self._doubt.requests} requests in a row")
            failures += next_step.costs
            if not next_step.costs:
                generation.excuse()
            await asyncio.sleep(next_step.pause_s)

    async def is_lost(self, e: EngineLost) -> bool:
        """Whether the engine is gone, and not just this call. Returns when that is known, and may be acted upon."""
        if self.lost or e.reason.startswith(STALLED):
            return True  # whose calls stand still is given up already
        if e.reason.startswith(ALONE):
            return False
        if e.reason.startswith(FAILED):
            return await self.canary.sing(Probe.GENERATE) is Evidence.PROBE_MISSED and await self.overseer.may_lose(e.reason)
        self._weigh(Evidence.BROKEN, e.reason)
        await asyncio.sleep(DEATH_IS_SEEN_S)  # a killed process is reported a moment after its connections broke
        while not self.lost:
            spared = self._doubt.lost(self._config.dead_after)
            if spared and await self.overseer.may_lose(e.reason):
                return True
            if await self.engine.alive():
                return self.lost
            self._weigh(Evidence.PROBE_MISSED, e.reason)
            await asyncio.sleep(SPARED_PAUSE_S if spared else PROBE_PAUSE_S)
        return True

    async def probe_idle(self) -> str:
        """Looks after the engine while nobody uses it; returns why it is lost."""
        why = ""

        async def tell(evidence: Evidence) -> bool:
            nonlocal why
            self._weigh(evidence, "the canary was not answered")
            why = f"probes: {self._doubt.probes} in a row were not answered while it was idle"
            return self.lost or (evidence is Evidence.PROBE_MISSED and await self._may_be_lost(why))

        await self.canary.watch(tell)
        return why

    async def abort(self, generation: Generation) -> None:
        """Tells the engine to stop what it does for this turn; one that is lost is not asked."""
        if generation.rid and not generation.finish and not self.lost:
            await self.engine.abort(generation.rid)

    async def _may_be_lost(self, why: str) -> bool:
        return self._doubt.lost(self._config.dead_after) and await self.overseer.may_lose(why)

    async def _may_lose_stalled(self, reason: str) -> bool:
        self._weigh(Evidence.STALLED, reason)
        return await self._may_be_lost(reason)

    def _weigh(self, evidence: Evidence, reason: str) -> None:
        before, self._doubt = self._doubt, weigh(self._doubt, evidence, paused=Closed.PAUSED in self.gate.closed)
        if before and not self._doubt:
            self.overseer.doubted("")
        elif self._doubt != before and evidence is not Evidence.PROBE_ANSWERED:
            self.overseer.doubted(reason)
            self.patience.when_moved(self._moved)

    def _moved(self) -> None:
        self._weigh(Evidence.MOVED, "")
