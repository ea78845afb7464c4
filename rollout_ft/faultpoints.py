"""The named points at which a fault plan may act; inert unless a plan is armed.

Owns the names. The product calls them; what happens there is decided in `rollout_ft.testing.faults`. A point that is
inert costs one call and changes nothing.
"""

from __future__ import annotations

from typing import Protocol

from rollout_ft.types import JSON, SessionSpec


class FaultPoints(Protocol):
    async def opened(self, spec: SessionSpec) -> None:
        """An engine actor holds this trial's session from now on."""
        ...

    async def generating(self, spec: SessionSpec, turn: int, tokens: int) -> JSON | None:
        """Turn number `turn` of the trial has `tokens` so far; may add sampling parameters before the first."""
        ...

    async def committed(self, spec: SessionSpec, turn: int) -> None:
        """The turn is in the store, its reply has not left."""
        ...

    async def replying(self, trial_id: str, turn: int) -> bool:
        """The reply of this turn is about to be written to the client; True to cut the connection instead."""
        ...


class Inert:
    """No faults."""

    async def opened(self, spec: SessionSpec) -> None:
        return None

    async def generating(self, spec: SessionSpec, turn: int, tokens: int) -> JSON | None:
        return None

    async def committed(self, spec: SessionSpec, turn: int) -> None:
        return None

    async def replying(self, trial_id: str, turn: int) -> bool:
        return False
