"""The turns of a session, as a tree that is searched by conversation.

Owns the nodes and the index from a conversation's digest to the turns that end there. Knows nothing of requests in
flight. A node holds what its turn added and nothing of its ancestors; it is never changed, and nothing is removed: a
rollback is a request that extends an older node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import orjson

from rollout_ft.session.canonical import extend_digest, start_digest
from rollout_ft.types import JSON, Turn


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """`asked_digest` is the conversation's digest up to the request, `end_digest` with the reply as well.

    `ids_json` is what this turn adds to an engine's `input_ids`, as JSON without brackets; `tokens` counts the whole
    path; `token_digest` names all its tokens.
    """

    turn: Turn
    parent: Node | None
    base: str
    end_digest: bytes
    tokens: int
    token_digest: bytes
    ids_json: bytes
    last_id: int


def ids_of(data: bytes) -> list[int]:
    """int32 bytes to a list of ids."""
    return np.frombuffer(data, dtype="<i4").tolist()


def ids_bytes(ids: list[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()


def digest_tokens(before: bytes, ids: bytes) -> bytes:
    return blake2b(before + ids, digest_size=16).digest()


def base_key(parent_key: str, asked_digest: bytes, sampling: bytes) -> str:
    """What a request asks for; all its samples share it."""
    return blake2b(parent_key.encode() + b"|" + asked_digest + sampling, digest_size=16).hexdigest()


def turn_key(base: str, sample: int) -> str:
    """What a turn is, whoever sends it: DESIGN section 3."""
    return blake2b(f"{base}/{sample}".encode(), digest_size=16).hexdigest()


class Tree:
    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.tokens = 0
        """Of all turns, each counted with what it adds to its path."""
        self._by_end: dict[bytes, list[Node]] = {}
        self._by_base: dict[str, list[Node]] = {}
        self._bases_after: dict[str, set[str]] = {}

    def add(self, turn: Turn) -> Node:
        """Adds a committed turn whose parent is here; the same turn again changes nothing."""
        known = self.nodes.get(turn.key)
        if known is not None:
            return known
        parent = self.nodes[turn.parent] if turn.parent else None
        asked = parent.end_digest if parent else start_digest(turn.tools)
        messages: list[JSON] = orjson.loads(turn.messages)
        for message in messages:
            asked = extend_digest(asked, message)
        prompt, output = ids_of(turn.prompt_ids), ids_of(turn.output_ids)
        node = Node(
            turn=turn,
            parent=parent,
            base=base_key(turn.parent, asked, turn.sampling),
            end_digest=extend_digest(asked, orjson.loads(turn.reply)),
            tokens=(parent.tokens if parent else 0) + len(prompt) + len(output),
            token_digest=digest_tokens(parent.token_digest if parent else b"", turn.prompt_ids + turn.output_ids),
            ids_json=orjson.dumps(prompt + output)[1:-1],
            last_id=output[-1] if output else -1,
        )
        self.nodes[turn.key] = node
        self.tokens += len(prompt) + len(output)
        self._by_end.setdefault(node.end_digest, []).append(node)
        self._by_base.setdefault(node.base, []).append(node)
        self._bases_after.setdefault(turn.parent, set()).add(node.base)
        return node

    def branches(self, parent: Node | None, base: str) -> bool:
        """Whether asking `base` after `parent` goes another way than what is recorded there."""
        return bool(self._bases_after.get(parent.turn.key if parent else "", set()) - {base})

    def samples(self, base: str) -> list[Node]:
        """The recorded samples of one body, in the order of their numbers."""
        return sorted(self._by_base.get(base, ()), key=lambda node: node.turn.sample)

    def deepest(self, digests: list[bytes], rank: Callable[[Node], int]) -> tuple[Node | None, int]:
        """The turn with the longest path that the conversation contains, and how many messages that path has.

        Of several whose texts are equal, the one with the highest `rank`, then the newest.
        """
        for count in range(len(digests) - 1, 0, -1):
            found = self._by_end.get(digests[count])
            if found:
                best = max(range(len(found)), key=lambda i: (rank(found[i]), i))
                return found[best], count
        return None, 0


def path(node: Node | None) -> Iterator[Node]:
    """From a node up to its root."""
    while node is not None:
        yield node
        node = node.parent
