"""Where in the tree a request stands.

Owns the search for the turn that a request extends, by its messages or by its tokens, and the key of what it asks for
there. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node, Tree, asked_in_tokens, base_key


@dataclass(frozen=True, slots=True)
class Place:
    """What is new begins at message `new_from`; in tokens it is `ids`, after the parent's path without its last `trim`."""

    parent: Node | None
    base: str
    new_from: int = 0
    trim: int = 0
    ids: bytes = b""


def locate(tree: Tree, request: TurnRequest, rank: Callable[[Node], int], asked: Callable[[str], bool], stop_ids: frozenset[int]) -> Place:
    """The deepest turn whose path the request contains. Raises BadRequest for a prompt without a token.

    Of turns with equal texts, one behind which the same was `asked` before: a retry means what it is a retry of,
    whatever the client was seen to have since. Else the one with the highest `rank`, then the newest.
    """
    sampling = orjson.dumps(request.sampling, option=orjson.OPT_SORT_KEYS)
    if request.input_ids is None:
        found, new_from = tree.deepest(request.digests)
        if not found:
            return Place(None, base_key("", request.digests[-1], sampling))
        places = [Place(node, base_key(node.turn.key, request.digests[-1], sampling), new_from) for node in found]
        if len(places) == 1:
            return places[0]
        best = max(range(len(places)), key=lambda i: (asked(places[i].base), rank(found[i]), i))
        return places[best]
    if not request.input_ids:
        raise BadRequest("input_ids must have at least one token", param="input_ids")
    parent, trim = tree.deepest_in_tokens(request.input_ids, rank, stop_ids)
    ids = request.input_ids[4 * (parent.tokens - trim) :] if parent else request.input_ids
    base = base_key(parent.turn.key if parent else "", asked_in_tokens(trim, ids), sampling)
    return Place(parent, base, trim=trim, ids=ids)
