"""The token ids of a path, spelled for engines that are asked in JSON.

Owns the text of the path that was asked for last, so that a turn spells only what it adds. Pure. What is here can be
made again from the turns at any time: a path that does not follow the one here is spelled from its beginning.
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

    def prompt(self, node: Node | None, trim: int, new: list[int]) -> bytes:
        """The ids of the path to `node` without its last `trim`, and the `new` ones."""
        self._go_to(node)
        end = _end_without(self._text, trim)
        with memoryview(self._text)[:end] as before:
            return b",".join(part for part in (before, orjson.dumps(new)[1:-1]) if part)

    def _go_to(self, node: Node | None) -> None:
        if node is self._node:
            return
        if node is None or node.parent is not self._node:
            self._text = bytearray(_spelled(path_ids(node)))
        else:
            del self._text[_end_without(self._text, node.turn.trim) :]
            own = _spelled(node.turn.prompt_ids + node.turn.output_ids)
            self._text += b"," + own if self._text and own else own
        self._node = node


def _end_without(text: bytearray, count: int) -> int:
    """Where the text ends without its last `count` ids."""
    end = len(text)
    for _ in range(count):
        end = max(0, text.rfind(b",", 0, end))
    return end


def _spelled(ids: bytes) -> bytes:
    return orjson.dumps(np.frombuffer(ids, "<i4"), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
