"""Drives one engine: call after call until a turn is finished.

Owns when the engine is called and how it is told to stop. Knows nothing of sessions or commits. Nothing is sent while
the gate is closed or without a place; whether a failure costs the turn anything is the ladder's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from zlib import crc32

from rollout_ft.clock import monotonic
from rollout_ft.config import EngineConfig
from rollout_ft.engine.admission import Admission
from rollout_ft.engine.gate import Gate
from rollout_ft.engine.generation import Generation, Progress, VersionsMixed
from rollout_ft.engine.ladder import GiveUp, after_refusal
from rollout_ft.engine.patience import Patience
from rollout_ft.engine.port import Engine
from rollout_ft.errors import EngineAborted, EngineLost, EngineRefused

DEATH_IS_SEEN_S = 0.05


class Driver:
    def __init__(self, engine: Engine, config: EngineConfig):
        self.engine, self._config = engine, config
        self.patience = Patience(config.first_token_timeout_s, config.token_timeout_s)
        self.gate = Gate(self.patience)
        self.admission = Admission()
        self.last_progress = monotonic()
        self.lost = False
        """Nothing more is sent: the engine is being replaced."""
        self.calls: dict[int, tuple[Generation, float]] = {}
        """What the engine has of ours, and since when."""
        self.ranks = 1
        """How many data-parallel ranks the engine has."""
        self.theirs: Callable[[str], None] | None = None
        """Where the engine has another owner: told of an abort that was not ours, with the weights' version."""
        self.look: Callable[[], Awaitable[None]] | None = None
        """Where the engine has another owner: looks at what they do with it just now."""

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
                    await self._call(generation, progress)
                    return
                except VersionsMixed:
                    await self.abort(generation)
                    generation.excuse()
                    generation.begin_anew()
                    continue
                except EngineRefused as e:
                    excused = closings != self.gate.closings
                    next_step = after_refusal(e, excused=excused, failures=failures, max_failures=self._config.max_generations_per_turn)
            if isinstance(next_step, GiveUp):
                raise next_step.error
            failures += next_step.costs
            if not next_step.costs:
                generation.excuse()
            await asyncio.sleep(next_step.pause_s)

    async def _call(self, generation: Generation, progress: Progress) -> None:
        self.calls[id(generation)] = generation, monotonic()
        try:
            await generation.call(self.engine, self.patience, progress)
        except EngineAborted as e:
            if self.theirs is not None and generation.asked != generation.rid:
                self.theirs(e.version)
            raise
        finally:
            del self.calls[id(generation)]

    def rank_of(self, session_id: str) -> int | None:
        """A session stays where its prefix is cached: on one rank."""
        return crc32(session_id.encode()) % self.ranks if self.ranks > 1 else None

    async def is_lost(self, e: EngineLost) -> bool:
        """A stalled stream beside others that move is a lost request; without any progress it is a lost engine."""
        if self.look is not None:
            await self.look()
            if self.gate.closed and not self.lost:
                return False  # its owner has it just now; whoever looks at it says when it is gone
        if self.lost:
            return True
        if e.reason.startswith("stalled"):
            return monotonic() - self.last_progress >= self.patience.token_s()
        await asyncio.sleep(DEATH_IS_SEEN_S)  # a killed process is reported a moment after its connections broke
        return self.lost or not await self.engine.alive()

    async def abort(self, generation: Generation) -> None:
        """Tells the engine to stop what it does for this turn; one that is lost is not asked."""
        if generation.rid and not generation.finish and not self.lost:
            generation.asked = generation.rid
            await self.engine.abort(generation.rid)
