"""The turns in flight at one engine, for people who look.

Owns what is said of one, and which are told when there are many. Pure. Nothing is kept for it: what a generation has is read when
somebody asks, so that nobody pays for it otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from heapq import nlargest

from rollout_ft.engine.gate import Closed
from rollout_ft.engine.generation import Generation
from rollout_ft.engine.held import Held
from rollout_ft.types import JSON


def in_flight(sessions: Iterable[Held], closed: Iterable[Closed], queued: bool, now: float, limit: int) -> JSON:
    """`{count, waits: {what: count}, turns}`: of all, the `limit` that have been without a token for longest.

    `closed`: why nothing goes to the engine; `queued`: calls wait for a place at it."""
    why = next((cause.value for cause in Closed if cause in frozenset(closed)), "")
    flying = [(held, g) for held in sessions for g in held.generations.values()]
    waits = Counter(waits_for(g, why, queued=queued) for _, g in flying)
    longest = nlargest(limit, flying, key=lambda each: now - last_token(each[1]))
    return {
        "count": len(flying),
        "waits": dict(waits),
        "turns": [_turn(held, g, waits_for(g, why, queued=queued), now) for held, g in longest],
    }


def waits_for(generation: Generation, closed: str, *, queued: bool) -> str:
    if generation.finish:
        return "commit"
    if closed:
        return closed
    if generation.calling:
        return "first_token" if generation.wait is None or generation.wait.owed else "tokens"
    return "admission" if queued else "retry"


def last_token(generation: Generation) -> float:
    """When its newest token came; before the first, when it began to wait for it."""
    return generation.wait.last if generation.wait is not None else generation.began


def _turn(held: Held, generation: Generation, waits: str, now: float) -> JSON:
    session = held.session
    return {
        "session_id": session.id, "trial_id": session.spec.trial_id, "attempt": session.attempt, "key": generation.order.turn_key,
        "turn": len(session.evidence.asked) + 1, "age_s": round(now - generation.began, 1),
        "quiet_s": round(now - last_token(generation), 1), "waits_for": waits, "tokens": len(generation.ids),
        "prompt_tokens": generation.order.prompt_tokens, "reused": generation.reused, "calls": generation.calls,
        "callers": held.waiting,
    }  # fmt: skip
