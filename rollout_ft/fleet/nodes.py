"""The nodes of the cluster, as Ray lists them and as our own calls find them.

Owns the list, the doubts, and whether somebody listens at an address. Decides nothing: `spread` does. Every question is
bounded in time, since Ray itself waits for a node that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from rollout_ft.clock import Clock, monotonic
from rollout_ft.fleet.spread import Node
from rollout_ft.rayapi import ray
from rollout_ft.types import JSON

DOUBT_S = 75.0
"""Longer than Ray's defaults take to see a node that stands still; then its list is to be believed again."""
LIST_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 0.5
NODE_LABEL = "ray.io/node-id"
_HEAD = "node:__internal_head__"


class Nodes:
    def __init__(self, clock: Clock = monotonic):
        self._clock = clock
        self._doubts: dict[str, float] = {}
        self._known: list[JSON] = []

    def doubt(self, node_id: str) -> None:
        """An actor there did not answer: nothing is placed there for a while if there is another choice."""
        if node_id:
            self._doubts[node_id] = self._clock()

    async def now(self) -> list[Node]:
        """The nodes that Ray calls alive; the last list when it does not say."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIST_TIMEOUT_S):
                self._known = await asyncio.to_thread(alive)
        since = self._clock() - DOUBT_S
        self._doubts = {node_id: at for node_id, at in self._doubts.items() if at > since}
        return [node_of(each, self._doubts) for each in self._known]

    async def pick(self, choose: Callable[[Collection[Node]], Node | None]) -> Node | None:
        """The node that `choose` takes; one whose raylet refuses a connection is doubted, and the choice made again."""
        nodes = await self.now()
        for _ in nodes:
            node = choose(nodes)
            if node is None or node.doubted or await self._raylet_listens(node.node_id):
                return node
            self.doubt(node.node_id)
            nodes = [node_of(each, self._doubts) for each in self._known]
        return choose(nodes)

    async def _raylet_listens(self, node_id: str) -> bool:
        each = next(n for n in self._known if n["NodeID"] == node_id)
        return not await refuses(each["NodeManagerAddress"], each["NodeManagerPort"])


def alive() -> list[JSON]:
    """Ray's list. Blocks."""
    listed: list[Any] = ray.nodes()
    return [each for each in listed if each["Alive"]]


def node_of(listed: JSON, doubts: Collection[str] = ()) -> Node:
    return Node(listed["NodeID"], listed["NodeManagerAddress"], _HEAD in listed["Resources"], listed["NodeID"] in doubts)


def preferred(node_id: str) -> JSON:
    """Ray's options for an actor that stands on this node, and on another when it is gone: soft affinity is not kept."""
    if not node_id:
        return {}
    return {"label_selector": {NODE_LABEL: node_id}, "fallback_strategy": [{"label_selector": {}}]}


async def addresses_of(url: str) -> list[str]:
    """The host of a URL and its addresses; without a resolver, the host as it is written."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LIST_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None)
        return sorted({host, *(str(entry[4][0]) for entry in found)})
    return [host]


async def refuses(host: str, port: int) -> bool:
    """Whether nobody listens there: the process has ended. Silence is no refusal."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
        writer.close()
    except ConnectionRefusedError:
        return True
    except (TimeoutError, OSError):
        return False
    return False
