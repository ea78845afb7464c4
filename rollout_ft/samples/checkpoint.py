"""What a restarted trial goes on from, for those who do not replay it request by request.

Owns the shape of `GET /sessions/{id}/checkpoint`. Pure.
"""

from __future__ import annotations

import orjson

from rollout_ft.samples.trajectory import Assembly
from rollout_ft.session.session import Session
from rollout_ft.session.tree import path
from rollout_ft.types import JSON, Step


def checkpoint_of(session: Session) -> Assembly:
    """`{session_id, attempt, messages, steps, steps_before}`: the conversation of earlier attempts with the last reply that they
    asked for, every recorded step of the environment, and the number of the last that was recorded before that reply."""
    node, steps = session.checkpoint, list(session.steps.recorded)
    nodes = list(path(node))[::-1]
    before = session.steps.before(node.turn.key) if node else 0

    def assemble() -> JSON:
        messages: list[JSON] = []
        for each in nodes:
            messages += [*orjson.loads(each.turn.messages or b"[]"), orjson.loads(each.turn.reply)]
        return {
            "session_id": session.id, "attempt": session.attempt, "messages": messages,
            "steps": [step_body(step) for step in steps], "steps_before": before,
        }  # fmt: skip

    return assemble


def step_body(step: Step) -> JSON:
    action, result = orjson.Fragment(step.action), orjson.Fragment(step.result)
    return {"attempt": step.attempt, "number": step.number, "action": action, "result": result, "snapshot": step.snapshot}
