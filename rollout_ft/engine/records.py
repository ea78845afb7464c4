"""What is recorded of a session beside its turns: answers, divergences, steps, failures.

Owns the entry and its key for each, and that one is recorded once. Decides nothing, and knows no engine. All of it goes to its
end though its caller leaves: what the store knows by then has to be known here as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from rollout_ft.clock import monotonic
from rollout_ft.engine.held import Held
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node
from rollout_ft.telemetry.events import Events
from rollout_ft.types import Answered, Divergence, Step


async def whole(work: Coroutine[Any, Any, None]) -> None:
    """To its end, also when its caller leaves: what the store knows by then has to be known here as well."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda t: t.cancelled() or t.exception())
    await asyncio.shield(task)


async def replayed(held: Held, node: Node, request: TurnRequest, first: bool) -> None:
    """A turn that was committed is given again; `first`: what says so is not recorded yet."""
    await whole(_replay(held, node, request, first))


async def _replay(held: Held, node: Node, request: TurnRequest, first: bool) -> None:
    entry = held.session.answer(node, request) if first else None
    if entry is not None:
        await held.commit(f"answer/{held.session.attempt}/{node.turn.key}/{request.request_id}", entry)
    held.session.replayed(node, request, entry)


async def heard(held: Held, node: Node, request: TurnRequest) -> Node:
    """A turn that was committed while nobody waited for it counts as asked for once somebody gets it."""
    key = request.idempotency_key
    new_key = key and key != node.turn.idempotency_key and all(key != other for _, other in node.turn.also)
    if node.turn.key in held.session.evidence.unheard or (new_key and held.session.known.has_room):
        await whole(_hear(held, node, request))
    return node


async def _hear(held: Held, node: Node, request: TurnRequest) -> None:
    key = f"answer/{held.session.attempt}/{node.turn.key}/{request.request_id}"
    await held.commit(key, Answered(node.turn.key, request.request_id, idempotency_key=request.idempotency_key))
    held.session.evidence.unheard.discard(node.turn.key)


async def diverged(held: Held, met: Divergence, events: Events) -> None:
    """A replay left its record here."""
    await whole(_diverge(held, met, events))


async def _diverge(held: Held, met: Divergence, events: Events) -> None:
    session = held.session
    async with held.failing:
        if met.base in session.divergences:
            return
        await held.commit(f"diverged/{session.attempt}/{met.base}", Answered(diverged=met))
        session.diverge(met)
    events.emit(
        "trial.diverged", trial=session.spec.trial_id, attempt=session.attempt, turn=met.turn, message=met.message, role=met.role,
        where=met.where, recorded=met.recorded, sent=met.sent, served=met.served,
    )  # fmt: skip


async def step(held: Held, taken: Step) -> Step:
    """What is recorded as this step of the attempt: this, unless another was before it."""
    await whole(_step(held, taken))
    return held.session.steps.known(taken) or taken


async def _step(held: Held, step: Step) -> None:
    async with held.stepping:
        if held.session.steps.known(step) is None:
            await held.commit(f"step/{step.attempt}/{step.number}", step)
            held.session.steps.add(step)
        held.changed = monotonic()


async def failure(held: Held, what: str) -> None:
    """Once is enough: an agent that has it happen again and again must not make the log grow."""
    await whole(_fail(held, what))


async def _fail(held: Held, what: str) -> None:
    failed = held.session.evidence.failed
    async with held.failing:
        if not failed.get(what):
            failed[what] = False
            await held.commit(f"fail/{held.session.attempt}/{what}", Answered(failed=what))
            failed[what] = True
