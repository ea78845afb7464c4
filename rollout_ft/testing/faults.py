"""Planned faults: each names (trial, turn, token), is met while the work is in flight, and fires once.

Owns the plan, an actor of the run, and what happens at the named points when a fault is due. The plan decides who may
fire: a point that is reached again after a restart, by another process, asks and is refused.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rollout_ft.engine.unit import Unit
from rollout_ft.faultpoints import FaultPoints, Inert
from rollout_ft.fleet.crew import Setup, actor_name
from rollout_ft.fleet.nodes import preferred
from rollout_ft.rayapi import ray
from rollout_ft.types import JSON, SessionSpec


class Kind(StrEnum):
    SLOW = "slow"
    """The generation goes on at `tokens_per_s` from `token` on: longer than the client waits."""
    CUT = "cut"
    """The connection is cut after the turn was committed: a phantom."""
    ENGINE_KILL = "engine_kill"
    ENGINE_FREEZE = "engine_freeze"
    ACTOR_KILL = "actor_kill"
    ACTOR_FREEZE = "actor_freeze"
    ACTOR_KILL_COMMITTED = "actor_kill_committed"
    """After the commit, before the reply."""
    AGENT_KILL = "agent_kill"
    STORE_KILL = "store_kill"
    GATEWAY_KILL = "gateway_kill"
    SUPERVISOR_KILL = "supervisor_kill"


@dataclass(frozen=True, slots=True)
class Fault:
    kind: Kind
    trial_id: str
    turn: int
    token: int = 0
    tokens_per_s: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.trial_id}/{self.turn}/{self.token}"


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, max_concurrency=1000)
class FaultPlan:
    """Who may fire what. Lives as long as the run, and is asked only by points whose trial has a fault."""

    def __init__(self, setup: Setup):
        self._run, self._namespace = setup.config.run, setup.namespace
        self._faults: dict[str, list[Fault]] = {}
        self._fired: dict[str, None] = {}
        self._agents: asyncio.Queue[str] = asyncio.Queue()

    async def arm(self, faults: list[Fault]) -> None:
        for fault in faults:
            self._faults.setdefault(fault.trial_id, []).append(fault)

    async def of(self, trial_id: str) -> list[Fault]:
        return self._faults.get(trial_id, [])

    async def claim(self, fault_id: str) -> bool:
        """True for the first who asks."""
        if fault_id in self._fired:
            return False
        self._fired[fault_id] = None
        return True

    async def fired(self) -> list[str]:
        return list(self._fired)

    async def kill_agent(self, trial_id: str) -> None:
        self._agents.put_nowait(trial_id)

    async def next_agent(self) -> str:
        """The trial whose agent is to be killed next, once there is one."""
        return await self._agents.get()

    async def kill_actor(self, role: str) -> None:
        """Kills one actor of the run whose role starts with this, by its process."""
        names: list[str] = sorted(a["name"] for a in ray.util.list_named_actors(all_namespaces=True))
        name = next(n for n in names if n.startswith(f"{self._run}/{role}"))
        ray.kill(ray.get_actor(name, self._namespace), no_restart=not role.startswith("supervisor"))


def create_plan(setup: Setup) -> Any:
    """The run's fault plan actor, on the node of who started the run: no planned fault takes it along."""
    name = actor_name(setup.config.run, "faults", 1)
    options: Any = {"name": name, "namespace": setup.namespace, "lifetime": "detached", **preferred(setup.home)}
    return FaultPlan.options(**options).remote(setup)


class Planned:
    """The named points, with a plan behind them."""

    def __init__(self, setup: Setup, unit: Unit | None):
        self._plan: Any = ray.get_actor(actor_name(setup.config.run, "faults", 1), setup.namespace)
        self._unit = unit
        self._known: dict[str, list[Fault]] = {}

    async def opened(self, spec: SessionSpec) -> None:
        self._known[spec.trial_id] = await self._plan.of.remote(spec.trial_id)

    async def generating(self, spec: SessionSpec, turn: int, tokens: int) -> JSON | None:
        for fault in self._due(spec.trial_id, turn):
            if fault.kind is Kind.SLOW:
                if tokens == 0 and await self._claim(fault):
                    return {"custom_params": {"tokens_per_s": fault.tokens_per_s, "from_token": fault.token}}
            elif fault.kind in _WHILE_GENERATING and tokens >= fault.token and await self._claim(fault):
                await self._act(fault)
        return None

    async def committed(self, spec: SessionSpec, turn: int) -> None:
        for fault in self._due(spec.trial_id, turn):
            if fault.kind is Kind.ACTOR_KILL_COMMITTED and await self._claim(fault):
                os.kill(os.getpid(), signal.SIGKILL)

    async def replying(self, trial_id: str, turn: int) -> bool:
        if trial_id not in self._known:
            self._known[trial_id] = await self._plan.of.remote(trial_id)
        for fault in self._due(trial_id, turn):
            if fault.kind is Kind.GATEWAY_KILL and await self._claim(fault):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.kind is Kind.CUT and await self._claim(fault):
                return True
        return False

    def _due(self, trial_id: str, turn: int) -> Iterable[Fault]:
        return [f for f in self._known.get(trial_id, ()) if f.turn == turn]

    async def _claim(self, fault: Fault) -> bool:
        self._known[fault.trial_id].remove(fault)
        return await self._plan.claim.remote(fault.id)

    async def _act(self, fault: Fault) -> None:
        engine_pid = self._unit.pid() if self._unit else None
        match fault.kind:
            case Kind.ENGINE_KILL if engine_pid:
                os.kill(engine_pid, signal.SIGKILL)
            case Kind.ENGINE_FREEZE if engine_pid:
                os.kill(engine_pid, signal.SIGSTOP)
            case Kind.ACTOR_KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Kind.ACTOR_FREEZE:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Kind.AGENT_KILL:
                await self._plan.kill_agent.remote(fault.trial_id)
            case Kind.STORE_KILL:
                await self._plan.kill_actor.remote("store")
            case Kind.SUPERVISOR_KILL:
                await self._plan.kill_actor.remote("supervisor")
            case _:
                raise AssertionError(f"{fault.id}: there is no engine process to act on")


_WHILE_GENERATING = frozenset(Kind) - {Kind.SLOW, Kind.CUT, Kind.GATEWAY_KILL, Kind.ACTOR_KILL_COMMITTED}


def fault_points(setup: Setup, unit: Unit | None = None) -> FaultPoints:
    """The points of a process: inert unless the run was made with a plan."""
    return Planned(setup, unit) if setup.faults else Inert()
