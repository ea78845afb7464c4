"""Faults of actors and nodes on several nodes, under load: every acknowledged turn is there once, byte for byte.

Each prints its seed and the command that repeats it when it fails.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from judged import Judged

from rollout_ft import runtime
from rollout_ft.fleet.spread import Node
from rollout_ft.testing.machines import Machines, machines
from rollout_ft.testing.siege import Blow, Siege, lay, settings, until
from rollout_ft.types import JSON

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SLOW = 2.0
"""How much longer than aimed at a machine that does other things may take."""
DROPPED = (
    '{"CoreWorkerService.grpc_client.PushTask":{"num_failures":-1,"req_failure_prob":0,"resp_failure_prob":20,"in_flight_failure_prob":0}}'
)


def recovered_within(siege: Siege, limit_s: float) -> bool:
    return bool(siege.next_token_s) and max(siege.next_token_s) < SLOW * limit_s


async def test_smoke_a_node_with_a_replica_and_an_engine_is_killed(ms: Machines, judged: Judged):
    siege = await lay(ms, Blow.NODE_KILLED, judged.seed, name="node")
    judged(siege)
    assert recovered_within(siege, 4.0)


async def test_a_node_with_a_replica_and_an_engine_freezes_and_comes_back(ms: Machines, judged: Judged):
    siege = await lay(ms, Blow.NODE_FROZEN, judged.seed, name="frozen")
    judged(siege)
    assert recovered_within(siege, 8.0)


async def test_an_engine_actor_is_killed(ms: Machines, judged: Judged):
    siege = await lay(ms, Blow.ENGINE_ACTOR, judged.seed, name="actor")
    judged(siege)
    assert recovered_within(siege, 1.5)


@pytest.mark.parametrize(("blow", "limit_s"), [(Blow.ENGINE_KILLED, 1.5), (Blow.ENGINE_FROZEN, 4.0)])
async def test_the_process_of_an_engine_is_killed_or_frozen(ms: Machines, judged: Judged, blow: Blow, limit_s: float):
    siege = await lay(ms, blow, judged.seed, name=blow.name.lower().replace("_", "-"))
    judged(siege)
    assert siege.detect_s is not None
    assert recovered_within(siege, limit_s)


async def test_a_store_actor_is_killed(ms: Machines, judged: Judged):
    siege = await lay(ms, Blow.STORE_ACTOR, judged.seed, name="store")
    judged(siege)
    assert [e["event"] for e in siege.events].count("store.lost") == 1


async def test_two_store_actors_are_killed_in_turn(ms: Machines, judged: Judged):
    siege = await lay(ms, Blow.STORES_IN_TURN, judged.seed, name="stores")
    judged(siege)
    assert [e["event"] for e in siege.events].count("store.lost") == 2


async def test_a_supervisor_whose_node_is_killed_goes_on_on_another(ms: Machines, judged: Judged, monkeypatch: pytest.MonkeyPatch):
    def beside_others(nodes: Collection[Node]) -> Node:
        return next(n for n in nodes if n.node_id in ms.workers)

    monkeypatch.setattr("rollout_ft.fleet.predecessor.for_supervisor", beside_others)
    siege = await lay(ms, Blow.SUPERVISOR_NODE, judged.seed, name="supervisor")
    judged(siege)
    assert any(e["event"] == "supervisor.rebuilt" for e in siege.events)


async def test_a_fifth_of_all_replies_between_actors_is_dropped(judged: Judged):
    with machines(3, RAY_testing_rpc_failure=DROPPED) as ms:
        judged(await lay(ms, Blow.NONE, judged.seed, name="dropped"), "20 % of the replies of actors dropped")


async def test_a_replica_that_shares_a_node_moves_to_one_that_joins(judged: Judged, tmp_path: Path):
    events: list[JSON] = []

    def apart() -> bool:
        return any(e["event"] == "view.opened" and len(e["nodes"]) == len(set(e["nodes"])) == 3 for e in events)

    with machines(1) as ms:
        config = settings(ms.address, str(tmp_path), "moves", judged.seed, store={"replicas": 3})
        async with runtime.start(config) as run:
            run.on_event = events.append
            assert len(set((await run.fleet())["nodes"].values())) == 2
            ms.add()
            await until(apart)


async def test_replicas_and_engines_stand_on_nodes_of_their_own_and_the_supervisor_on_the_head(ms: Machines, judged: Judged):
    siege = await lay(ms, Blow.NONE, judged.seed, name="placed", turns=3)
    judged(siege)
    opened = next(e for e in siege.events if e["event"] == "view.opened")
    assert len(set(opened["nodes"])) == 2
    assert ms.head.node_id not in opened["nodes"]
    assert not any(e["event"] == "store.exposed" for e in siege.events)
