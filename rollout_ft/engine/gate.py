"""Whether anything may be sent to the engine just now.

Owns the reasons that keep it closed, and everyone who waits for it to open. Knows nothing of who closes it. It is open
when no reason is left; each is taken away by whoever put it there. While it is closed no deadline runs.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from rollout_ft.clock import monotonic
from rollout_ft.engine.patience import Patience


class Closed(StrEnum):
    """Why nothing goes to an engine that lives."""

    PAUSED = "paused"
    """The trainer paused it through us."""
    OFFLOADED = "offloaded"
    """The trainer has its memory; opens only through loaded weights."""
    UPDATING = "updating"
    """Its weights are being loaded."""
    STALE = "stale"
    """It missed an update of the weights."""
    OWNER = "owner"
    """Its owner aborted, paused or offloaded it without telling us; opens when the owner is seen to have opened it."""


class Gate:
    def __init__(self, patience: Patience):
        self._patience = patience
        self._open = asyncio.Event()
        self._open.set()
        self.closed: frozenset[Closed] = frozenset()
        self._since = 0.0
        self.closings = 0
        """How often it was closed: what ended badly while this changed is excused."""
        self.waiting = 0

    def close(self, why: Closed) -> None:
        if why not in self.closed:
            self.closings += 1
            self._since = self._since if self.closed else monotonic()
            self.closed |= {why}
            self._open.clear()
            self._patience.stop()

    def open(self, why: Closed) -> None:
        if self.closed == frozenset({why}):
            self._open.set()
            self._patience.go_on()
        self.closed -= {why}

    def closed_s(self) -> float:
        """How long it has been closed; 0 while it is open."""
        return monotonic() - self._since if self.closed else 0.0

    async def opened(self) -> None:
        """Returns when something may be sent."""
        self.waiting += 1
        try:
            while self.closed:
                await self._open.wait()
        finally:
            self.waiting -= 1
