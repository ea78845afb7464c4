"""The tokens that a request adds to a path.

Owns the choice between appending to what is there and rendering everything anew. Pure. What was sampled stays as it was
sampled, also where the template would render it differently; a template that cannot be appended to keeps of the path
what it renders in the same tokens.
"""

from __future__ import annotations

import numpy as np
import orjson

from rollout_ft.session.place import Place
from rollout_ft.session.render import Renderer, Suffix
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import ids_bytes, ids_of, path_ids
from rollout_ft.types import JSON


def prompt(renderer: Renderer, request: TurnRequest, place: Place) -> Suffix:
    """How many tokens of the parent's path the prompt drops, and those that it adds. Raises BadRequest."""
    parent = place.parent
    if request.input_ids is not None:
        return Suffix(place.trim, ids_of(place.ids))
    if parent is None:
        return Suffix(0, renderer.root(request.messages, request.tool_list, request.template_kwargs))
    if not renderer.splices:
        whole = renderer.root(request.messages, request.tool_list, request.template_kwargs)
        kept = _common(path_ids(parent), ids_bytes(whole))
        return Suffix(parent.tokens - kept, whole[kept:])
    new = request.messages[place.new_from :]
    reply: JSON = orjson.loads(parent.turn.reply)
    return renderer.append(reply, parent.last_id, new, request.tool_list, request.template_kwargs)


def _common(one: bytes, other: bytes) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other)) // 4
    differ = np.flatnonzero(np.frombuffer(one, "<i4", size) != np.frombuffer(other, "<i4", size))
    return int(differ[0]) if len(differ) else size
