"""Which engine takes a session.

Owns the choice. Pure. A session stays where its prefix is cached for as long as that engine is trusted and not draining;
else it goes to the engine with the fewest sessions for its share, of those that did not just fail for it. One in doubt is
taken only when no other is there, one that drains never. A new engine's share grows to the others' over `warmup_s`: after
a mass failure it is not the place where everybody goes at once.

No session is moved for balance: it would cost a prefill of all its tokens. Sessions end, and new ones go where there are
fewest, so that an engine that came back fills within the life of a trial.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

LEAST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Candidate:
    """`sessions` it has or is about to have, all alike: who of them generates just now is known to their engine alone."""

    engine_id: str
    serves: bool
    sessions: int
    suspect: bool = False
    draining: bool = False
    share: float = 1.0


def share(up_s: float, warmup_s: float) -> float:
    """Of what an engine takes when it has been up for long."""
    return min(1.0, max(LEAST_SHARE, up_s / warmup_s))


def place(candidates: Collection[Candidate], *, prefer: str = "", exclude: Collection[str] = ()) -> str | None:
    """The id of the engine, or None when none can serve."""
    able = [c for c in candidates if c.serves and not c.draining and c.engine_id not in exclude]
    fit = [c for c in able if not c.suspect] or able
    if any(c.engine_id == prefer for c in fit):
        return prefer
    return min(fit, key=lambda c: ((c.sessions + 1) / c.share, c.engine_id)).engine_id if fit else None
