"""The token ids of a path, spelled for engines that are asked in JSON.

Owns the text of the path that was asked for last, so that a turn spells only what it adds, and copies nothing: a prompt
is a view of that text. Pure. What is here can be made again from the turns at any time: a path that does not follow the
one here is spelled from its beginning.

The subtle invariant: a text of which somebody has a view only ever gets longer or shorter, which Python refuses as long
as there is a view; then a copy is changed instead.
"""

from __future__ import annotations

import numpy as np
import orjson

from rollout_ft.session.tree import Node, path_ids


class Spelling:
    """`5,6,7` for the ids 5, 6 and 7: JSON without brackets, to be joined with what comes behind."""

    def __init__(self) -> None:
        self._node: Node | None = None
        self._text = bytearray()
        self._kept, self._rest = 0, b""
        """How much of the text is the path's, and how the path goes on from there: the text goes on otherwise."""

    def prompt(self, node: Node | None, trim: int, new: list[int]) -> memoryview:
        """The ids of the path to `node` without its last `trim`, and the `new` ones."""
        self._go_to(node)
        end = _end_without(self._text, trim)
        self._kept, self._rest = end, bytes(self._text[end:])
        self._replace(end, orjson.dumps(new)[1:-1])
        return memoryview(self._text)

    def _go_to(self, node: Node | None) -> None:
        self._replace(self._kept, self._rest, joined=False)
        if node is not self._node:
            if node is None or node.parent is not self._node:
                self._text = bytearray(_spelled(path_ids(node)))
            else:
                self._replace(_end_without(self._text, node.turn.trim), _spelled(node.turn.prompt_ids + node.turn.output_ids))
        self._node = node
        self._kept, self._rest = len(self._text), b""

    def _replace(self, end: int, more: bytes, *, joined: bool = True) -> None:
        """What stands behind `end` gives way to `more`, with a comma between."""
        if joined and end and more:
            more = b"," + more
        try:
            del self._text[end:]
            self._text += more
        except BufferError:
            self._text = self._text[:end] + more


def _end_without(text: bytearray, count: int) -> int:
    """Where the text ends without its last `count` ids."""
    end = len(text)
    for _ in range(count):
        end = max(0, text.rfind(b",", 0, end))
    return end


def _spelled(ids: bytes) -> bytes:
    return orjson.dumps(np.frombuffer(ids, "<i4"), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
