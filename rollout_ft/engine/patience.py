"""How long a token of an engine may take.

Owns the deadlines of all calls that wait for one. Knows nothing of what they wait for. While the engine is paused on
purpose no time counts: `stop` suspends every deadline, those that begin meanwhile included, and `go_on` gives each its
whole time again, for an engine that continues may have to compute its prompts anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Patience:
    def __init__(self, first_token_s: float, token_s: float):
        self._first_token_s, self._token_s = first_token_s, token_s
        self._waiting: dict[asyncio.Timeout, float] = {}
        self._stopped = False

    def first_token_s(self) -> float:
        return self._first_token_s

    def token_s(self) -> float:
        return self._token_s

    @asynccontextmanager
    async def within(self, wait_s: float) -> AsyncGenerator[None]:
        """Raises TimeoutError when the body takes longer, the time that stood still left out."""
        async with asyncio.timeout(None if self._stopped else wait_s) as deadline:
            self._waiting[deadline] = wait_s
            try:
                yield
            finally:
                del self._waiting[deadline]

    def stop(self) -> None:
        self._stopped = True
        for deadline in self._waiting:
            deadline.reschedule(None)

    def go_on(self) -> None:
        self._stopped = False
        now = asyncio.get_running_loop().time()
        for deadline, wait_s in self._waiting.items():
            deadline.reschedule(now + wait_s)
