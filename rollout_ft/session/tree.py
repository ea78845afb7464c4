"""The turns of a session, as a tree that is searched by conversation or by tokens.

Owns the nodes and the index from a conversation's digest to the turns that end there. Knows nothing of requests in
flight. A node holds what its turn added and nothing of its ancestors; it is never changed, and nothing is removed: a
rollback is a request that extends an older node. A turn that trims its parent leaves the parent's tokens as they are:
the path through it has fewer of them (`pieces`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import orjson

from rollout_ft.session.canonical import Mark, MessageKey, message_key, start
from rollout_ft.types import JSON, Turn


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """`end` is where the conversation stands with the reply; None for a turn that was asked for in tokens.

    `own` counts the tokens that this turn adds, `tokens` the whole path; `token_digest` names all its tokens.
    """

    turn: Turn
    parent: Node | None
    base: str
    end: Mark | None
    own: int
    tokens: int
    token_digest: bytes
    last_id: int


def ids_of(data: bytes) -> list[int]:
    """int32 bytes to a list of ids."""
    return np.frombuffer(data, dtype="<i4").tolist()


def outside(ids: bytes, vocab_size: int) -> bool:
    """Whether one of them is no token of the vocabulary: it would end an engine."""
    array = np.frombuffer(ids, "<i4")
    return bool(array.size) and not 0 <= int(array.min()) <= int(array.max()) < vocab_size


def ids_bytes(ids: list[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()


def digest_tokens(before: bytes, ids: bytes, trim: int = 0) -> bytes:
    """Names the tokens of a path: those named `before`, without the last `trim`, and `ids`."""
    return blake2b(before + (b"-%d|" % trim if trim else b"") + ids, digest_size=16).digest()


def asked_in_tokens(trim: int, ids: bytes) -> bytes:
    """What stands for the conversation's digest where a prompt came as tokens."""
    return b"tokens" + digest_tokens(b"", ids, trim)


def base_key(parent_key: str, asked_digest: bytes, sampling: bytes) -> str:
    """What a request asks for; all its samples share it."""
    return blake2b(parent_key.encode() + b"|" + asked_digest + sampling, digest_size=16).hexdigest()


def turn_key(base: str, sample: int) -> str:
    """What a turn is, whoever sends it: DESIGN section 3."""
    return blake2b(f"{base}/{sample}".encode(), digest_size=16).hexdigest()


class Tree:
    def __init__(self, key: MessageKey = message_key) -> None:
        self.nodes: dict[str, Node] = {}
        self._key = key
        self.tokens = 0
        """Of all turns, each counted with what it adds to its path."""
        self._by_end: dict[bytes, list[Node]] = {}
        self._by_base: dict[str, list[Node]] = {}
        self._children: dict[str, list[Node]] = {}

    def add(self, turn: Turn) -> Node:
        """Adds a committed turn whose parent is here; the same turn again changes nothing."""
        known = self.nodes.get(turn.key)
        if known is not None:
            return known
        parent = self.nodes[turn.parent] if turn.parent else None
        asked, end = self._conversation(turn, parent)
        own = (len(turn.prompt_ids) + len(turn.output_ids)) // 4
        node = Node(
            turn=turn,
            parent=parent,
            base=base_key(turn.parent, asked, turn.sampling),
            end=end,
            own=own,
            tokens=(parent.tokens if parent else 0) - turn.trim + own,
            token_digest=digest_tokens(parent.token_digest if parent else b"", turn.prompt_ids + turn.output_ids, turn.trim),
            last_id=int.from_bytes(turn.output_ids[-4:], "little") if turn.output_ids else -1,
        )
        self.nodes[turn.key] = node
        self.tokens += own
        if end is not None:
            self._by_end.setdefault(end.digest, []).append(node)
        self._by_base.setdefault(node.base, []).append(node)
        self._children.setdefault(turn.parent, []).append(node)
        return node

    def _conversation(self, turn: Turn, parent: Node | None) -> tuple[bytes, Mark | None]:
        """What was asked for, and where the conversation stands with the reply."""
        mark = parent.end if parent else start(turn.tools)
        if not turn.messages or mark is None:
            return asked_in_tokens(turn.trim, turn.prompt_ids), None
        messages: list[JSON] = orjson.loads(turn.messages)
        for message in messages:
            mark = mark.after(message, key=self._key)
        return mark.digest, mark.after(orjson.loads(turn.reply), key=self._key)

    def asked(self, node: Node) -> bytes:
        """The digest of the conversation that a turn was asked for with."""
        return self._conversation(node.turn, node.parent)[0]

    def asked_before(self, parent: Node | None, asked: bytes) -> bool:
        """Whether this conversation is recorded here, under whatever sampling: then it cannot stand for another."""
        key = parent.turn.key if parent else ""
        return any(base_key(key, asked, child.turn.sampling) == child.base for child in self.children(parent))

    def children(self, parent: Node | None) -> list[Node]:
        """The turns that were built upon one, or upon nothing, in the order of their commits."""
        return self._children.get(parent.turn.key if parent else "", [])

    def branches(self, parent: Node | None, base: str) -> bool:
        """Whether asking `base` after `parent` goes another way than what is recorded there."""
        return any(child.base != base for child in self.children(parent))

    def beside(self, node: Node) -> list[Node]:
        """The other turns with the same parent."""
        return [other for other in self._children[node.turn.parent] if other is not node]

    def samples(self, base: str) -> list[Node]:
        """The recorded samples of one body, in the order of their numbers."""
        return sorted(self._by_base.get(base, ()), key=lambda node: node.turn.sample)

    def deepest(self, digests: list[bytes]) -> tuple[list[Node], int]:
        """The turns with the longest path that the conversation contains, several where their texts are equal, the
        newest last; and how many messages that path has."""
        for count in range(len(digests) - 1, 0, -1):
            found = self._by_end.get(digests[count])
            if found:
                return found, count
        return [], 0

    def deepest_in_tokens(self, ids: bytes, rank: Callable[[Node], int], stop_ids: frozenset[int]) -> tuple[Node | None, int]:
        """The turn with the longest path that `ids` start with, and how many of its last tokens they lack.

        That is the token that stopped it, which templates and trainers leave out, or none. Of several with equal tokens
        the one with the highest `rank`, then the newest. Compares only where the path so far is in `ids`.
        """
        best: tuple[tuple[int, int, int, int], Node | None, int] = ((0, 0, 0, -1), None, 0)
        left: list[tuple[Node | None, int]] = [(None, 0)]
        seen = 0
        while left:
            parent, same = left.pop()
            for node in self._children.get(parent.turn.key if parent else "", ()):
                begins = node.tokens - node.own
                if same < begins:  # the path leaves `ids` before this turn; one that follows may drop that part again
                    left.append((node, same))
                    continue
                shared = begins + _common(node, ids, 4 * begins)
                missing = node.tokens - shared
                said = len(node.turn.output_ids) // 4
                stopped = missing == 1 and said > 1 and node.last_id in stop_ids
                seen += 1
                if said and (missing == 0 or stopped):
                    best = max(best, ((shared, rank(node), -missing, seen), node, missing), key=lambda b: b[0])
                left.append((node, shared))
        return best[1], best[2]


def _common(node: Node, ids: bytes, at: int) -> int:
    """How many of a turn's own tokens `ids` have at `at`, in a row."""
    turn = node.turn
    if ids.startswith(turn.prompt_ids, at) and ids.startswith(turn.output_ids, at + len(turn.prompt_ids)):
        return node.own
    own, there = np.frombuffer(turn.prompt_ids + turn.output_ids, "<i4"), np.frombuffer(ids[at : at + 4 * node.own], "<i4")
    differ = np.flatnonzero(own[: len(there)] != there)
    return int(differ[0]) if len(differ) else len(there)


def path(node: Node | None) -> Iterator[Node]:
    """From a node up to its root."""
    while node is not None:
        yield node
        node = node.parent


def said(node: Node | None) -> list[JSON]:
    """The conversation of a path as it is recorded, with its replies."""
    turns = [n.turn for n in path(node)]
    return [message for turn in reversed(turns) for message in (*orjson.loads(turn.messages), orjson.loads(turn.reply))]


def pieces(node: Node | None, trim: int = 0) -> Iterator[tuple[Node, int]]:
    """From a node up to its root: each with how many of its own tokens are on the path, its last `trim` left out."""
    while node is not None:
        kept = max(0, node.own - trim)
        yield node, kept
        trim = trim - (node.own - kept) + node.turn.trim
        node = node.parent


def path_ids(node: Node | None) -> bytes:
    """All tokens of a path, as int32 bytes."""
    found = [(n.turn.prompt_ids + n.turn.output_ids)[: 4 * kept] for n, kept in pieces(node)]
    return b"".join(reversed(found))
