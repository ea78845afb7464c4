"""Which engine takes a session.

Owns the choice. Pure. A session stays where its prefix is cached for as long as that engine serves; else it goes to
the engine with the fewest sessions, of those that did not just fail for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    engine_id: str
    serves: bool
    sessions: int


def place(candidates: Collection[Candidate], *, prefer: str = "", exclude: Collection[str] = ()) -> str | None:
    """The id of the engine, or None when none can serve."""
    fit = [c for c in candidates if c.serves and c.engine_id not in exclude]
    if any(c.engine_id == prefer for c in fit):
        return prefer
    return min(fit, key=lambda c: (c.sessions, c.engine_id)).engine_id if fit else None
