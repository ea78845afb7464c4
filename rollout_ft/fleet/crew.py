"""The run's actors: made, each on its node, found again by name, killed.

Owns names and Ray's options, and who stands where. Decides nothing: where the next one goes is `spread`'s. An actor that
is not told by the supervisor that the run lives ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rollout_ft.checkpoint.view import View
from rollout_ft.config import Config, journalled
from rollout_ft.engine import ranks
from rollout_ft.errors import EngineLost
from rollout_ft.fleet import spread
from rollout_ft.fleet.member import Member
from rollout_ft.fleet.nodes import NODE_LABEL, Nodes, addresses_of
from rollout_ft.fleet.spread import Node, Placement
from rollout_ft.rayapi import ray

LOCK_MARGIN_S = 15.0
LIST_TIMEOUT_S = 30.0
"""For Ray's control plane to list the actors; without it nothing can be rebuilt."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every actor of a run is told when it is made."""

    config: Config
    namespace: str
    secret: str
    faults: bool = False
    loopback: bool = False
    """The cluster is this machine alone: nothing listens on other addresses."""
    home: str = ""
    """The node of who started the run."""
    last_view: int = 0
    """The highest view that is known to have been open: what the journals have must not be older."""
    otel: dict[str, str] | None = field(default=None, repr=False)
    """The environment of OpenTelemetry's exporter; None where nothing is traced. Keys of a collector may be in it."""


def actor_name(run: str, role: str, incarnation: int) -> str:
    """DESIGN section 4: `{run}/{role}/{incarnation}`."""
    return f"{run}/{role}/{incarnation}"


def shown_as(name: str) -> str:
    """What Ray's dashboard and logs call an actor of this name. Ray asks once, when it is made: nothing of it may change."""
    parts = name.rsplit("/", 2)
    return f"rollout_ft {parts[1]} (run {parts[0]}, start {parts[2]})" if len(parts) == 3 else f"rollout_ft {name}"


class Crew:
    def __init__(self, setup: Setup):
        self.setup = setup
        self.nodes = Nodes()
        self._run, self._namespace = setup.config.run, setup.namespace
        self._at: dict[str, tuple[str, str]] = {}
        self._choosing = asyncio.Lock()
        self._killing: set[asyncio.Task[None]] = set()

    async def engine(self, engine_id: str, incarnation: int, view: View, target: str = "") -> Member:
        """`target`: the URL of an engine that somebody else owns, beside which its actor stands where there is a choice."""
        from rollout_ft.engine.actor import EngineActor

        args = (self.setup, engine_id, incarnation, view, target)
        gpus = self.setup.config.engine.num_gpus
        if self.setup.config.engine.nodes > 1:
            group = await self._group(actor_name(self._run, engine_id, incarnation))
            return self._make(EngineActor, engine_id, incarnation, *args, scheduling_strategy=group, **ranks.options(gpus))
        if gpus:  # which GPUs are free is Ray's to know
            away = await self._away()
            options: dict[str, Any] = {"label_selector": away} if away else {}
            return self._make(EngineActor, engine_id, incarnation, *args, num_gpus=gpus, scheduling_strategy="SPREAD", **options)
        async with self._choosing:
            choose = partial(spread.for_engine, stores=self._count("store"), engines=self._count("engine"))
            if target:
                beside = await addresses_of(target)
                choose = partial(spread.for_attached, beside=beside, home=self.setup.home, otherwise=choose)
            return self._make(EngineActor, engine_id, incarnation, *args, node=await self.nodes.pick(choose))

    async def _group(self, name: str) -> PlacementGroupSchedulingStrategy:
        """The nodes of one engine, as many as it has, reserved together and never two for one; the first is the actor's.

        Detached, for the supervisor may die and the engine is to go on: it ends in `gone` or `disband`.
        """
        engine = self.setup.config.engine
        needs, away = ranks.needs(engine.num_gpus), await self._away()
        options: dict[str, Any] = {"bundle_label_selector": [away] * engine.nodes} if away else {}
        group = placement_group([needs] * engine.nodes, strategy="STRICT_SPREAD", name=name, lifetime="detached", **options)
        if not await asyncio.to_thread(group.wait, engine.start_timeout_s):
            await asyncio.to_thread(_ungroup, name)
            each = ", ".join(f"{count:g} {what}" for what, count in needs.items())
            raise EngineLost(name, f"no {engine.nodes} nodes (engine.nodes) with {each} free on each, within engine.start_timeout_s")
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)

    async def disband(self, keep: Collection[str] = ()) -> None:
        """Gives back the nodes of every engine of the run whose actor is not to be kept."""
        if self.setup.config.engine.nodes > 1:
            table: dict[str, Any] = await asyncio.to_thread(ray.util.placement_group_table)
            names = [str(group["name"]) for group in table.values() if group["name"].startswith(f"{self._run}/engine-")]
            await asyncio.gather(*(asyncio.to_thread(_ungroup, name) for name in names if name not in keep))

    async def _away(self) -> dict[str, str]:
        """Selects nodes that are not doubted; empty where all are to be had."""
        away = [n.node_id for n in await self.nodes.now() if n.doubted]
        return {NODE_LABEL: f"!in({','.join(away)})"} if away else {}

    async def gateway(self, role: str, incarnation: int, port: int) -> Member:
        from rollout_ft.gateway.actor import GatewayActor

        async with self._choosing:
            host = self.setup.config.gateway.host
            choose = partial(spread.for_gateway, gateways=self._count("gateway"), host=host, home=self.setup.home)
            name = actor_name(self._run, role, incarnation)
            return self._make(GatewayActor, role, incarnation, self.setup, name, port, node=await self.nodes.pick(choose))

    async def store(self, role: str, incarnation: int, view: View | None) -> Member | None:
        """None where `store.placement` has no node for it."""
        from rollout_ft.checkpoint.store import create_store_actor

        config, name = self.setup.config, actor_name(self._run, role, incarnation)
        distinct = config.store.placement is Placement.DISTINCT
        async with self._choosing:
            options: dict[str, Any] = {}
            if config.store.placement is not Placement.ANY:
                stores, engines = self._count("store"), self._count("engine")
                node = await self.nodes.pick(partial(spread.for_store, stores=stores, engines=engines, distinct=distinct))
                if node is None and distinct:
                    return None
                options = self._stands(name, role, node)
            journal = config.store.journal_dir if journalled(config) else None
            handle = create_store_actor(
                name, self._namespace, view, journal, memory_bytes=config.store.memory_bytes, payload_bytes=config.store.payload_bytes,
                loopback=self.setup.loopback, patience_s=config.orphan_s + LOCK_MARGIN_S, **options,
            )  # fmt: skip
        return Member(role, incarnation, name, handle)

    def name(self, role: str, incarnation: int) -> str:
        return actor_name(self._run, role, incarnation)

    def node_of(self, member: Member) -> str:
        """The node that it was placed on or was seen on; empty when nobody knows."""
        return self._at.get(member.name, ("", ""))[1]

    def seen(self, member: Member, node_id: str) -> None:
        """It said itself where it is."""
        self._at[member.name] = (member.role, node_id)

    def gone(self, member: Member, *, silent: bool = False) -> None:
        """Kills it; it counts for no placement any more. `silent`: it did not answer, and its node may be why."""
        node = self._at.pop(member.name, ("", ""))[1]
        if silent:
            self.nodes.doubt(node)
        task = asyncio.create_task(asyncio.to_thread(self._kill, member))
        self._killing.add(task)
        task.add_done_callback(self._killing.discard)

    def _kill(self, member: Member) -> None:
        member.kill()
        if self.setup.config.engine.nodes > 1 and member.role.startswith("engine-"):
            _ungroup(member.name)

    async def existing(self) -> list[Member]:
        """Every actor of the run that Ray still knows, the supervisor left out."""
        async with asyncio.timeout(LIST_TIMEOUT_S):
            return await asyncio.to_thread(self._existing)

    def _existing(self) -> list[Member]:
        found: list[Member] = []
        for each in ray.util.list_named_actors(all_namespaces=True):
            run, _, rest = each["name"].partition("/")
            role, _, incarnation = rest.partition("/")
            if each["namespace"] != self._namespace or run != self._run or role == "supervisor":
                continue
            with contextlib.suppress(ValueError):
                handle = ray.get_actor(each["name"], self._namespace)
                found.append(Member(role, int(incarnation), each["name"], handle))
        return found

    def _count(self, kind: str) -> Counter[str]:
        """How many actors of a kind each node has."""
        return Counter(node for role, node in self._at.values() if role.startswith(f"{kind}-"))

    def _stands(self, name: str, role: str, node: Node | None) -> dict[str, Any]:
        """Ray's option for an actor that was given this node, which from now on counts as there."""
        if node is None:
            return {}
        self._at[name] = (role, node.node_id)
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}

    def _make(self, actor: Any, role: str, incarnation: int, *args: Any, node: Node | None = None, **options: Any) -> Member:
        name = actor_name(self._run, role, incarnation)
        settings = {"name": name, "namespace": self._namespace, "lifetime": "detached", **self._stands(name, role, node), **options}
        return Member(role, incarnation, name, actor.options(**settings).remote(*args))


def _ungroup(name: str) -> None:
    """Gives back the nodes of an engine, and ends what is left of it there."""
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(name))
