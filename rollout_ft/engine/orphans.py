"""Engine calls that nobody wants any more, until the engine is seen to be rid of them.

Owns the aborts of one engine. Knows nothing of turns. The 200 of an abort proves nothing, and an engine tells how many
requests it has, not which: they are gone when it has no more than we have calls there. Until then all are aborted again,
for a while; then an event says that they were not seen to go, and the engine's own lease is what ends them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rollout_ft.engine.port import Engine
from rollout_ft.telemetry.events import Events

FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0
ROUNDS = 16
"""Of aborts, a quarter of a minute."""
MAX_ORPHANS = 1024
"""Aborted again together; the oldest are left to the engine's lease."""


class Orphans:
    def __init__(self, engine: Engine, ours: Callable[[], int], events: Events):
        self._engine, self._ours, self._events = engine, ours, events
        self._rounds: dict[str, int] = {}
        self._burying: asyncio.Task[None] | None = None

    @property
    def left(self) -> int:
        """How many were not seen to go yet."""
        return len(self._rounds)

    def bury(self, *rids: str) -> None:
        """Aborts these, and sees to it that they are gone."""
        for rid in rids:
            self._rounds.setdefault(rid, 0)
        while len(self._rounds) > MAX_ORPHANS:
            del self._rounds[next(iter(self._rounds))]
        if self._rounds and (self._burying is None or self._burying.done()):
            self._burying = asyncio.create_task(self._bury())

    async def _bury(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._rounds:
            now = list(self._rounds)
            await asyncio.gather(*(self._engine.abort(rid) for rid in now))
            await asyncio.sleep(pause_s)
            load, ours = await self._engine.load(), self._ours()
            if load is not None and load <= ours:
                self._drop(now)
            else:
                self._count(now, load, ours)
            pause_s = min(MAX_PAUSE_S, 2 * pause_s) if self._rounds.keys() & set(now) else FIRST_PAUSE_S

    def _drop(self, rids: list[str]) -> None:
        for rid in rids:
            self._rounds.pop(rid, None)

    def _count(self, rids: list[str], load: int | None, ours: int) -> None:
        for rid in rids:
            if rid in self._rounds:
                self._rounds[rid] += 1
        lingering = [rid for rid, rounds in self._rounds.items() if rounds >= ROUNDS]
        self._drop(lingering)
        if lingering:
            self._events.emit("orphans.linger", rids=lingering[:16], count=len(lingering), engine_load=load, ours=ours)

    def aclose(self) -> None:
        if self._burying is not None:
            self._burying.cancel()
