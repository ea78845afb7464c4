"""Drives one engine: call after call until a turn is finished.

Owns when the engine is called, how it is told to stop, and what is held against it. Knows nothing of sessions or commits.
Nothing is sent while the gate is closed or without a place; whether a failure costs the turn anything is the ladder's to
say. An engine is given up on suspicion only when the overseer agrees; until then what runs on it waits.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol
from zlib import crc32

from rollout_ft.clock import monotonic
from rollout_ft.config import EngineConfig
from rollout_ft.engine.admission import Admission, Place
from rollout_ft.engine.canary import Canary, Probe
from rollout_ft.engine.evidence import Doubt, Evidence, of_status, weigh
from rollout_ft.engine.gate import Closed, Gate
from rollout_ft.engine.generation import Generation, Progress, VersionsMixed
from rollout_ft.engine.ladder import FULL, GiveUp, spent_error
from rollout_ft.engine.orphans import Orphans
from rollout_ft.engine.pace import Floors, Pace
from rollout_ft.engine.patience import ALONE, STALLED, Patience
from rollout_ft.engine.port import Engine
from rollout_ft.engine.retries import Retries
from rollout_ft.errors import EngineAborted, EngineLost, EngineRefused
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.metrics import ADMISSION, GENERATIONS, SPANS_DROPPED, TURNS_PARKED, Counts, Readings
from rollout_ft.telemetry.tracing import OFF

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
    def __init__(
        self, engine: Engine, config: EngineConfig, events: Events | None = None, luck: Callable[[], float] = random.random,
        counts: Counts | None = None,
    ):  # fmt: skip
        self.engine, self._config = engine, config
        self.counts = counts or Counts()
        c = config
        floors = Floors(c.first_token_timeout_s, c.token_timeout_s, c.compile_timeout_s, c.max_timeout_s, c.timeout_factor)
        self.patience = Patience(Pace(floors), self._may_lose_stalled)
        self.gate = Gate(self.patience)
        self.admission = Admission(config.admission)
        events = events or Events("driver")
        self.orphans, self._retries = Orphans(engine, lambda: self.admission.in_flight, events), Retries(config, events, luck)
        self.canary = Canary(engine, config, self.gate, self.patience)
        self.overseer: Overseer = Alone()
        self.tracing = OFF
        self._doubt = Doubt()
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

        Raises EngineLost, Overloaded, or EngineRefused when the request is wrong or the turn's budget is spent.
        """
        refusals, retry = 0, generation.calls > 0
        while not generation.complete():
            if generation.calls >= self._config.max_generations_per_turn:
                raise spent_error(generation.calls)
            await self._retries.affordable(retry)
            refused, excused = await self._call(generation, progress, began)
            if refused is None:
                return
            then, refusals = self._retries.after(refused, excused=excused, spent=generation.calls, refusals=refusals)
            evidence = Evidence.REFUSED if excused else of_status(refused.status)
            self._weigh(evidence, str(refused))
            if isinstance(then, GiveUp):
                raise then.error
            if evidence is Evidence.FAILED and self._doubt.lost(self._config.dead_after):
                raise EngineLost("", f"{FAILED}{self._doubt.requests} requests in a row")
            retry = then.retry
            if not then.costs:
                generation.excuse()
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
                    await self._tracked(generation, progress, partial(self._answered, place, closings))
                    return None, False
                except VersionsMixed:
                    self.abort(generation)
                    generation.excuse()
                    generation.begin_anew()
                except EngineLost as e:
                    if e.reason.startswith(ALONE):
                        place.refused()
                    raise
                except EngineRefused as e:
                    if e.status in FULL:
                        place.refused()
                    return e, closings != self.gate.closings

    def _answered(self, place: Place, closings: int) -> None:
        if closings == self.gate.closings:  # the time of a pause is not the engine's
            place.answered()

    async def _tracked(self, generation: Generation, progress: Progress, answered: Callable[[], None]) -> None:
        self.calls[id(generation)] = generation, monotonic()
        outcome, cause, span = "cancelled", "", self.tracing.call(generation)
        try:
            await generation.call(self.engine, self.patience, progress, span.when_answered(answered))
            outcome = "finished"
        except EngineAborted as e:
            outcome = "aborted"
            if self.theirs is not None and generation.asked != generation.rid:
                self.theirs(e.version)
            raise
        except (EngineRefused, EngineLost, VersionsMixed) as e:
            outcome = "refused" if isinstance(e, EngineRefused) else "lost" if isinstance(e, EngineLost) else "mixed"
            cause = str(e)
            raise
        finally:
            self.counts.add(GENERATIONS, outcome)
            span.end(outcome, cause)
            del self.calls[id(generation)]

    def readings(self) -> Readings:
        """What was counted here, and what waits here; of several reasons for a closed gate, the first."""
        why = next((cause for cause in Closed if cause in self.gate.closed), None)
        parked = {(TURNS_PARKED, why.value): self.gate.waiting} if why else {}
        return Readings(
            {**self.counts.values, (SPANS_DROPPED,): self.tracing.dropped}, {**parked, (TURNS_PARKED, ADMISSION): self.admission.waiting}
        )

    def rank_of(self, session_id: str) -> int | None:
        """A session stays where its prefix is cached: on one rank."""
        return crc32(session_id.encode()) % self.ranks if self.ranks > 1 else None

    async def is_lost(self, e: EngineLost) -> bool:
        """Whether the engine is gone, and not just this call. Returns when that is known, and may be acted upon."""
        if await self._is_theirs_now() and not self.lost:
            return False
        if self.lost or e.reason.startswith(STALLED):
            return True  # whose calls stand still is given up already
        if e.reason.startswith(ALONE):
            return False
        if e.reason.startswith(FAILED):
            probe = Probe.GENERATE if self.look is None else Probe.INFO
            return await self.canary.sing(probe) is Evidence.PROBE_MISSED and await self.overseer.may_lose(e.reason)
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

    def abort(self, generation: Generation) -> None:
        """Nobody wants what the engine does for this turn any more; one that is lost is not asked."""
        if generation.rid and not generation.finish and not self.lost:
            generation.asked = generation.rid
            self.orphans.bury(generation.rid)

    def aclose(self) -> None:
        self.orphans.aclose()

    async def _may_be_lost(self, why: str) -> bool:
        return self._doubt.lost(self._config.dead_after) and await self.overseer.may_lose(why)

    async def _is_theirs_now(self) -> bool:
        """Whether the engine's owner has it just now: then whoever looks at it says when it is gone."""
        if self.look is not None:
            await self.look()
        return self.look is not None and bool(self.gate.closed)

    async def _may_lose_stalled(self, reason: str) -> bool:
        if await self._is_theirs_now():
            return False
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
