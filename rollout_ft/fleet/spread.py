"""On which node the next actor of the run goes.

Owns the choice for stores, engines, gateways and the supervisor, and the words for what a bad placement risks. Pure:
Ray's placement strategies are best effort, and what one lost node may cost is not left to them. A node that is doubted
comes last everywhere: Ray calls a dead node alive for up to a minute, and an actor that is placed there never starts.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

LOCAL = "localhost"


class Placement(StrEnum):
    """Where store replicas go (`store.placement`)."""

    SPREAD = "spread"
    DISTINCT = "distinct"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Node:
    """A node that Ray calls alive. `doubted`: somebody there was silent a moment ago."""

    node_id: str
    address: str
    head: bool = False
    doubted: bool = False


def for_store(nodes: Collection[Node], stores: Counter[str], engines: Counter[str], *, distinct: bool = False) -> Node | None:
    """The node of the next replica: one that holds none, the head last, since what dies with it is more than a replica.

    With `distinct` None where every node holds one already.
    """
    fit = [n for n in nodes if not (distinct and stores[n.node_id])]
    return min(fit, key=lambda n: (n.doubted, stores[n.node_id], n.head, engines[n.node_id], n.node_id), default=None)


def for_engine(nodes: Collection[Node], stores: Counter[str], engines: Counter[str]) -> Node | None:
    """The node of the next engine that asks Ray for no GPU: the one with the fewest."""
    return min(nodes, key=lambda n: (n.doubted, engines[n.node_id], n.head, stores[n.node_id], n.node_id), default=None)


def for_attached(
    nodes: Collection[Node], *, beside: Collection[str], home: str, otherwise: Callable[[Collection[Node]], Node | None]
) -> Node | None:
    """The node of an actor whose engine is there already: the engine's, if it is one of ours and not in doubt; `beside` are the
    engine's addresses. A loopback address means home's machine."""
    at_home = any(_is_loopback(address) for address in beside)
    fit = [n for n in nodes if not n.doubted and (n.address in beside or (at_home and n.node_id == home))]
    return min(fit, key=lambda n: n.node_id, default=None) or otherwise(nodes)


def for_gateway(nodes: Collection[Node], gateways: Counter[str], *, host: str, home: str) -> Node | None:
    """The node of the next gateway: one that has the address to listen on; `home` is the node of who started the run.

    Agents come to one address, so that a loopback address means home's machine. Where every node has the address, they
    are spread: who balances over them is `gateway.advertise_url`.
    """
    at_home = {n.address for n in nodes if n.node_id == home}
    if _is_loopback(host):
        fit = [n for n in nodes if n.address in at_home] or list(nodes)
        return min(fit, key=lambda n: (n.doubted, n.node_id != home, n.node_id), default=None)
    fit = [n for n in nodes if n.address == host] or list(nodes)
    return min(fit, key=lambda n: (n.doubted, gateways[n.node_id], n.node_id != home, n.node_id), default=None)


def for_supervisor(nodes: Collection[Node]) -> Node | None:
    """The head: it holds no engine where there is another choice, and nothing can be decided without it anyway."""
    return min(nodes, key=lambda n: (not n.head, n.node_id), default=None)


def to_move(stores: Mapping[str, str], nodes: Collection[Node]) -> str | None:
    """The replica that shares its node although another node has none; None where all stand well.

    `stores` has the node of each replica.
    """
    held = Counter(stores.values())
    free = [n for n in nodes if not n.doubted and not n.head and not held[n.node_id]]
    return max((name for name, at in stores.items() if held[at] > 1), default=None) if free else None


def exposed(stores: Mapping[str, str], *, journal: bool) -> str:
    """What is lost when one node holds all replicas, in words; empty when none does."""
    if len(set(stores.values())) != 1:
        return ""
    node, count = next(iter(stores.values())), len(stores)
    all_of_them = f"all {count} replicas of the checkpoint store are" if count > 1 else "the only replica of the checkpoint store is"
    lost = (
        "no trial can go on until its journal is read again" if journal
        else "every turn of every unfinished trial is lost; set store.journal_dir, or add nodes"
    )  # fmt: skip
    return f"{all_of_them} on node {node[:12] or '?'}: if that node is lost, {lost}"


def _is_loopback(host: str) -> bool:
    try:
        return host == LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
