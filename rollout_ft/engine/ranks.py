"""An engine that stretches over several nodes: one process on each, one failure unit.

Owns the start of all ranks and their common end: the first that ends, or whose node does not answer, ends the others. Only
rank 0 is spoken to; what the other ranks' servers say of their health means nothing. The actors of the other ranks are
children of the engine's actor, so that they end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout_ft.config import Config
from rollout_ft.engine import ports
from rollout_ft.engine.launch import Rank
from rollout_ft.engine.launched import Launched
from rollout_ft.errors import EngineLost
from rollout_ft.fleet.node import assigned_gpus, node_ip
from rollout_ft.rayapi import ray

MISSES = 3
SHARE = 0.001
"""Of a CPU: an actor that asks for nothing could not be held to its node of a placement group."""


def needs(num_gpus: float) -> dict[str, float]:
    """What one node of an engine asks Ray for."""
    return {"GPU": num_gpus} if num_gpus else {"CPU": SHARE}


def options(num_gpus: float) -> dict[str, Any]:
    """The same, as an actor's options."""
    return {"num_gpus": num_gpus} if num_gpus else {"num_cpus": SHARE}


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, max_concurrency=16)
class RankActor:
    """A node of an engine that is not its first."""

    def __init__(self, config: Config, engine_id: str, name: str):
        self._config, self._engine_id, self._name = config, engine_id, name
        self._unit: Launched | None = None

    async def begin(self, rank: Rank) -> None:
        if self._unit is None:
            self._unit = await Launched.begin(self._config, self._engine_id, self._name, assigned_gpus(), rank)

    async def wait(self) -> tuple[str, bool]:
        """Why the process ended, and whether a port that was taken is to blame, when it has."""
        assert self._unit is not None
        return await self._unit.wait(), self._unit.lost_a_port

    async def pid(self) -> int | None:
        assert self._unit is not None
        return self._unit.pid()

    async def ping(self) -> None:
        return

    def __repr__(self) -> str:
        return f"rollout_ft part of {self._name}"


class Ranked:
    """A `Unit`: the processes of an engine on all of its nodes."""

    ours = True

    def __init__(self, engine_id: str, first: Launched, others: list[Any], ping_s: float):
        self._engine_id, self._first, self._others, self._ping_s = engine_id, first, others, ping_s
        self._lost_a_port = False
        self.url = first.url
        self._ended = asyncio.create_task(self._watch())

    @classmethod
    async def begin(cls, config: Config, engine_id: str, name: str, loopback: bool) -> Ranked:
        """Starts a process on every node of the placement group that this actor is in."""
        claimed = ports.claim(random.Random())
        meet = f"{node_ip(loopback)}:{claimed.rendezvous}"
        first = await Launched.begin(config, engine_id, name, assigned_gpus(), Rank(0, meet), claimed)
        others = [_make(config, engine_id, name, number) for number in range(1, config.engine.nodes)]
        try:
            await asyncio.gather(*(other.begin.remote(Rank(number, meet)) for number, other in enumerate(others, 1)))
        except BaseException as e:
            _kill(others)
            await first.aclose()
            if isinstance(e, RayError):
                raise EngineLost(engine_id, f"a rank cannot be started: {type(e).__name__}") from e
            raise
        return cls(engine_id, first, others, config.fleet.ping_s)

    async def ready(self) -> None:
        ready = asyncio.create_task(self._first.ready())
        try:
            await asyncio.wait({ready, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():  # whichever rank it was: that rank 0 was killed for it is not the reason
                raise EngineLost(self._engine_id, f"{self._ended.result()} (at its start)")
            await ready
        finally:
            ready.cancel()

    @property
    def lost_a_port(self) -> bool:
        return self._lost_a_port

    def pid(self) -> int | None:
        return self._first.pid()

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        self._first.kill()
        asyncio.get_running_loop().run_in_executor(None, _kill, self._others)

    async def aclose(self) -> None:
        self.kill()
        await self._first.aclose()
        await self._ended

    async def _watch(self) -> str:
        watching = [asyncio.create_task(self._first_ended())]
        watching += [asyncio.create_task(self._ended_of(number, other)) for number, other in enumerate(self._others, 1)]
        await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        reason, self._lost_a_port = next(task for task in watching if task.done()).result()
        for task in watching:
            task.cancel()
        self.kill()
        return reason

    async def _first_ended(self) -> tuple[str, bool]:
        return await self._first.wait(), self._first.lost_a_port

    async def _ended_of(self, number: int, other: Any) -> tuple[str, bool]:
        """The end of another rank, as it says itself, or as its silence does: Ray takes long to see that a node is gone."""
        end, misses = asyncio.create_task(_asked(other.wait.remote())), 0
        try:
            while misses < MISSES:
                await asyncio.wait({end}, timeout=self._ping_s)
                if end.done():
                    reason, lost_a_port = end.result()
                    return f"rank {number} {reason}", lost_a_port
                try:
                    async with asyncio.timeout(self._ping_s):
                        await other.ping.remote()
                    misses = 0
                except (TimeoutError, RayError):
                    misses += 1
            return f"rank {number} does not answer", False
        finally:
            end.cancel()


async def _asked(call: Any) -> tuple[str, bool]:
    try:
        return await call
    except RayError as e:
        return f"is gone: {type(e).__name__}", False


def _make(config: Config, engine_id: str, name: str, number: int) -> Any:
    """An actor on node `number` of this actor's placement group."""
    group: Any = get_current_placement_group()
    at = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
    made: Any = RankActor.options(scheduling_strategy=at, **options(config.engine.num_gpus))
    return made.remote(config, engine_id, name.replace(engine_id, f"{engine_id}.rank{number}"))


def _kill(others: list[Any]) -> None:
    for other in others:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(other, no_restart=True)
