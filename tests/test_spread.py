"""On which node an actor goes, and what is said when the placement risks something."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.fleet.spread import Node, exposed, for_engine, for_gateway, for_store, for_supervisor, to_move

few = settings(max_examples=100, deadline=None)

IDS = [f"n{i}" for i in range(6)]
NODES = st.lists(st.sampled_from(IDS), unique=True, max_size=6).flatmap(
    lambda ids: st.tuples(*(st.builds(Node, st.just(i), st.just(f"10.0.0.{i[1:]}"), st.just(i == "n0"), st.booleans()) for i in ids))
)
COUNTS = st.dictionaries(st.sampled_from(IDS), st.integers(0, 3)).map(Counter)
CLUSTER = [Node(i, f"10.0.0.{i[1:]}", head=i == "n0") for i in IDS]


@few
@given(NODES, COUNTS, COUNTS)
def test_a_replica_goes_to_a_node_that_holds_none_where_there_is_one(nodes: tuple[Node, ...], stores: Counter[str], engines: Counter[str]):
    chosen = for_store(nodes, stores, engines)
    free = [n for n in nodes if not n.doubted and not stores[n.node_id]]
    if free:
        assert chosen in free
        assert not chosen.head or all(n.head for n in free)


@few
@given(NODES, COUNTS, COUNTS)
def test_no_node_that_is_doubted_is_chosen_where_another_is_not(nodes: tuple[Node, ...], stores: Counter[str], engines: Counter[str]):
    sure = [n for n in nodes if not n.doubted]
    for chosen in (for_store(nodes, stores, engines), for_engine(nodes, stores, engines)):
        assert chosen in (sure or nodes) if nodes else chosen is None


@few
@given(st.integers(1, 6), st.integers(1, 12))
def test_replicas_placed_one_after_the_other_are_even_and_on_the_head_last(count: int, replicas: int):
    nodes, stores = CLUSTER[:count], Counter[str]()
    for _ in range(replicas):
        chosen = for_store(nodes, stores, Counter())
        assert chosen is not None
        stores[chosen.node_id] += 1
    held = [stores[n.node_id] for n in nodes]
    assert max(held) - min(held) <= 1
    assert stores["n0"] == min(held)


@few
@given(NODES, COUNTS)
def test_distinct_replicas_never_share_a_node(nodes: tuple[Node, ...], stores: Counter[str]):
    chosen = for_store(nodes, stores, Counter(), distinct=True)
    free = [n for n in nodes if not stores[n.node_id]]
    assert chosen in free if free else chosen is None


@few
@given(st.integers(1, 6), st.integers(1, 12))
def test_engines_are_spread_evenly(count: int, engines: int):
    held = Counter[str]()
    for _ in range(engines):
        chosen = for_engine(CLUSTER[:count], Counter(), held)
        assert chosen is not None
        held[chosen.node_id] += 1
    assert max(held.values()) - min(held[n.node_id] for n in CLUSTER[:count]) <= 1


def test_an_engine_goes_beside_no_replica_where_it_can():
    assert for_engine(CLUSTER[:4], Counter(n1=1, n2=1), Counter()) == CLUSTER[3]


@pytest.mark.parametrize(
    ("host", "gateways", "expected"),
    [
        ("127.0.0.1", {"n3": 1}, "n3"),
        ("localhost", {"n3": 5}, "n3"),
        ("::1", {}, "n3"),
        ("10.0.0.2", {"n2": 1}, "n2"),
        ("0.0.0.0", {}, "n3"),
        ("0.0.0.0", {"n3": 1}, "n0"),
        ("0.0.0.0", {"n3": 1, "n0": 1}, "n1"),
        ("gateway.example", {"n3": 1}, "n0"),
    ],
)
def test_a_gateway_goes_where_its_address_is(host: str, gateways: dict[str, int], expected: str):
    chosen = for_gateway(CLUSTER[:4], Counter(gateways), host=host, home="n3")
    assert chosen is not None
    assert chosen.node_id == expected


def test_nodes_of_one_machine_share_its_loopback_address():
    nodes = [Node("a", "127.0.0.1", doubted=True), Node("b", "127.0.0.1")]
    assert for_gateway(nodes, Counter(), host="127.0.0.1", home="a") == nodes[1]


def test_the_supervisor_stands_on_the_head():
    assert for_supervisor(list(reversed(CLUSTER))) == CLUSTER[0]
    assert for_supervisor(CLUSTER[1:]) == CLUSTER[1]
    assert for_supervisor([]) is None


@few
@given(st.dictionaries(st.sampled_from(["s0", "s1", "s2"]), st.sampled_from(IDS)), NODES)
def test_a_replica_moves_only_from_a_shared_node_to_one_that_holds_none(stores: dict[str, str], nodes: tuple[Node, ...]):
    moved = to_move(stores, nodes)
    held = Counter(stores.values())
    better = [n for n in nodes if not n.doubted and not n.head and not held[n.node_id]]
    assert (moved is not None) == (bool(better) and max(held.values(), default=0) > 1)
    if moved is not None:
        assert held[stores[moved]] > 1
        target = for_store(nodes, held, Counter())
        assert target is not None
        assert not held[target.node_id]


def test_what_is_lost_with_a_node_that_holds_all_replicas_is_said():
    both = {"run/store-0/1": "abc", "run/store-1/1": "abc"}
    assert "all 2 replicas" in exposed(both, journal=False)
    assert "every turn of every unfinished trial is lost" in exposed(both, journal=False)
    assert "until its journal is read again" in exposed(both, journal=True)
    assert "the only replica" in exposed({"run/store-0/1": "abc"}, journal=False)
    assert not exposed({**both, "run/store-2/1": "def"}, journal=False)
    assert not exposed({}, journal=False)
