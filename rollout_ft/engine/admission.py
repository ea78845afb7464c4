"""Who may call the engine, and when.

Owns the places of one engine and who waits for one. Knows nothing of what the calls are. Of those that wait the oldest
trial is first, so that trials come to an end; but its age is worth a bounded head start only, and nobody is overtaken by
those that come later than that. A turn that waits here costs the engine nothing, and no deadline of the engine's runs.
"""

from __future__ import annotations

import asyncio
import math
from heapq import heapify, heappop, heappush
from types import TracebackType

from rollout_ft.clock import Clock, monotonic, wall
from rollout_ft.config import AdmissionConfig
from rollout_ft.engine.limit import Limit, Rules
from rollout_ft.errors import Overloaded

MAX_RETRY_AFTER_S = 60
SHARE = 0.1
"""Of the last call's time in how long a call takes."""


class Place:
    """One place, for the body of an `async with`."""

    __slots__ = ("_admission", "_began", "_beside", "_since")

    def __init__(self, admission: Admission, began: float):
        self._admission, self._began, self._since, self._beside = admission, began, 0.0, 0

    async def __aenter__(self) -> Place:
        a = self._admission
        if a.waiting or a.in_flight >= a.limit.calls:
            await a.wait(self._began)
        else:
            a.in_flight += 1
        self._since, self._beside = a.clock(), a.in_flight
        a.limit.began(self._beside)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        a = self._admission
        a.call_s += SHARE * (a.clock() - self._since - a.call_s)
        a.leave()

    def answered(self) -> None:
        """The first token of this call is there."""
        a = self._admission
        a.limit.answered(self._since, self._beside, a.in_flight, a.clock())
        a.grant()

    def refused(self) -> None:
        """The engine had no room for this call."""
        a = self._admission
        a.limit.refused(self._since, a.clock())


class Admission:
    def __init__(self, config: AdmissionConfig, clock: Clock = monotonic, wall_clock: Clock = wall):
        self._config, self.clock, self._wall = config, clock, wall_clock
        c = config
        self.limit = Limit(
            Rules(c.min_calls, c.max_calls, c.start_calls, c.first_token_target_s, c.first_token_tolerance, c.window_s), clock()
        )  # fmt: skip
        self.in_flight = 0
        self.waiting = 0
        self.call_s = 0.0
        """How long a call holds its place, about."""
        self._heap: list[tuple[float, int, asyncio.Future[None]]] = []
        self._asked = 0

    def place(self, began: float) -> Place:
        """A place of the engine, for a trial that `began` then (wall clock). Entering it raises Overloaded."""
        return Place(self, began)

    async def wait(self, began: float) -> None:
        """Until there is a place for this trial. Raises Overloaded when too many wait already."""
        if self.waiting >= self._config.max_waiting:
            raise Overloaded("too many turns wait for this engine (engine.admission.max_waiting)", self._retry_after_s())
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked += 1
        self.waiting += 1
        heappush(self._heap, (self.clock() - self._head_start_s(began), self._asked, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.leave()
            else:
                self.waiting -= 1
                self._sweep()
            raise

    def leave(self) -> None:
        self.in_flight -= 1
        self.grant()

    def grant(self) -> None:
        """Gives what is free to those that wait."""
        while self.waiting and self.in_flight < self.limit.calls:
            _, _, granted = heappop(self._heap)
            if not granted.done():
                self.waiting -= 1
                self.in_flight += 1
                granted.set_result(None)

    def _head_start_s(self, began: float) -> float:
        """Grows with a trial's age, and never beyond the bound: the order among those that wait never changes."""
        age, bound = max(0.0, self._wall() - began), self._config.max_head_start_s
        return bound * age / (age + bound)

    def _sweep(self) -> None:
        """Those that left are dropped when they are most of it."""
        if len(self._heap) > 2 * self.waiting + 16:
            self._heap = [each for each in self._heap if not each[2].done()]
            heapify(self._heap)

    def _retry_after_s(self) -> int:
        """How long what waits takes, about."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.waiting * self.call_s / self.limit.calls)))
