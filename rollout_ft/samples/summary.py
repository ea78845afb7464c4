"""What a person or a runner wants to know of a trial, in one flat object.

Owns its keys. Pure.
"""

from __future__ import annotations

from rollout_ft.samples.trajectory import metadata
from rollout_ft.session.session import Session
from rollout_ft.types import JSON


def summary(session: Session) -> JSON:
    """`seconds`: from the first attempt to the end, with all that was between them, to the second.

    `tainted`: a request of this attempt ended in our 5xx and was never answered later, or met a fault."""
    spec, ended = session.spec, session.ended
    return {
        "trial_id": spec.trial_id, "task_id": spec.task_id, "group_id": spec.group_id, "mode": spec.mode, "pool": spec.pool,
        "session_id": session.id, "attempt": session.attempt, "recovery": spec.recovery.value,
        "state": "ended" if ended else "running",
        "outcome": ended.outcome.value if ended else None, "reward": ended.reward if ended else None,
        "cause": ended.cause if ended else "", "seconds": ended.created - session.began if ended else None,
        "turns": len(session.evidence.asked),
        "tainted": bool(session.fault) or bool(session.unanswered()), "fault": session.fault, "metadata": metadata(session),
        "idempotency_key": spec.idempotency_key,
    }  # fmt: skip
