"""An actor's right to live: ends when nobody renews it.

Owns one deadline. A detached actor outlives its creator, so that it has to find out by itself that its run is gone.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from rollout_ft.clock import Clock, monotonic


@dataclass(slots=True)
class Lease:
    length_s: float
    clock: Clock = monotonic
    _renewed: float = 0.0

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._renewed = self.clock()

    def allow(self, seconds: float) -> None:
        """Nobody can renew it before a start is over, which may take so long beyond its length."""
        self._renewed = self.clock() + seconds

    @property
    def expired(self) -> bool:
        return self.clock() - self._renewed > self.length_s


async def live(lease: Lease) -> None:
    """Ends this process when nobody renews the lease. Run as a task for as long as the process serves."""
    while not lease.expired:
        await asyncio.sleep(lease.length_s / 10)
    os._exit(0)
