"""What goes wrong in each step, on purpose: an engine killed while it generates, an agent killed, a connection cut.

Owns the plan, and the hand that kills agents. A run that is not tested has neither: `rollout_ft.start` plans no faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import rollout_ft
from rollout_ft.rayapi import ray
from rollout_ft.testing.faults import Fault, Kind

KINDS = (Kind.ENGINE_KILL, Kind.AGENT_KILL, Kind.CUT)


def plan(seed: str, tasks: Sequence[dict[str, Any]]) -> list[Fault]:
    """One fault of each kind, each in a trial of its own, in a turn and after a token that the seed gives."""
    rng = random.Random(seed)
    chosen = rng.sample(tasks, len(KINDS))
    return [
        Fault(kind, task["task_id"], rng.randint(1, len(task["letters"])), rng.randint(1, 6))
        for kind, task in zip(KINDS, chosen, strict=True)
    ]


class Trouble:
    """The run's planned faults."""

    def __init__(self, plan: Any):
        self._plan = plan

    async def arm(self, faults: Sequence[Fault]) -> None:
        await self._plan.arm.remote(list(faults))

    async def met(self, faults: Sequence[Fault]) -> list[Fault]:
        """Those that happened."""
        fired = set(await self._plan.fired.remote())
        return [fault for fault in faults if fault.id in fired]


@contextlib.asynccontextmanager
async def trouble(run: rollout_ft.Run, agent: rollout_ft.ProcessAgent) -> AsyncGenerator[Trouble]:
    plan: Any = ray.get_actor(f"{run.config.run}/faults/1", run.setup.namespace)

    async def kill_agents() -> None:
        while True:
            agent.kill(await plan.next_agent.remote())

    killer = asyncio.create_task(kill_agents())
    try:
        yield Trouble(plan)
    finally:
        killer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killer
