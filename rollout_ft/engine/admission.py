"""How many calls an engine has at once.

Owns the places of one engine and who waits for one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Admission:
    @asynccontextmanager
    async def place(self, began: float) -> AsyncGenerator[None]:
        """A place of the engine for the body; of those that wait, the trial that `began` (a wall clock time) first is first."""
        yield
