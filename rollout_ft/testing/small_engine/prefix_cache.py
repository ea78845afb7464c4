"""Which computed positions can serve a new prompt.

Owns the rows of keys and values of sequences, and their order of use. Must not know how rows are computed. The subtle
invariant: a row depends on the tokens up to it and the weights only, so a copied row is the row that would have been
computed; rows made by other weights must never get in.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray

from rollout_ft.testing.small_engine.model import Ids

_FIRST_CAPACITY = 512

LayerRows = tuple[torch.Tensor, NDArray[np.float32]]
"""One layer's rows, and the same memory as an array: what torch multiplies, numpy fills at less cost."""


class Rows:
    """The tokens of one sequence and, for the first `computed` of them, their keys and values by layer.

    Tensors grow by doubling and rows have the same stride at every size, so a product over the first n rows has one
    shape and one layout whatever the capacity.
    """

    def __init__(self, ids: Ids, layers: int, width: int) -> None:
        self.computed = 0
        self.length = len(ids)
        capacity = _FIRST_CAPACITY
        while capacity < self.length:
            capacity *= 2
        self.ids: Ids = np.zeros(capacity, dtype=np.int32)
        self.ids[: self.length] = ids
        self.layers = [_layer(torch.zeros(capacity, width)) for _ in range(layers)]

    def append(self, token: int) -> None:
        if self.length == len(self.ids):
            self.ids = np.concatenate((self.ids, np.zeros_like(self.ids)))
            self.layers = [_layer(torch.cat((rows, torch.zeros_like(rows)))) for rows, _ in self.layers]
        self.ids[self.length] = token
        self.length += 1

    def copy_from(self, other: Rows, count: int) -> None:
        for (_, mine), (_, theirs) in zip(self.layers, other.layers, strict=True):
            mine[:count] = theirs[:count]
        self.computed = count


class PrefixCache:
    """Sequences in progress, and the finished ones that were used last, up to `max_tokens` rows."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._live: set[Rows] = set()
        self._finished: OrderedDict[Rows, None] = OrderedDict()

    def add(self, rows: Rows) -> None:
        """`rows` is being computed from now on: what it has may be copied at any time."""
        self._live.add(rows)

    def finish(self, rows: Rows, keep: bool) -> None:
        """Nothing is added to `rows` any more; `keep` says whether its rows are still those of the weights."""
        self._live.discard(rows)
        if not keep or not rows.computed:
            return
        for older in [entry for entry in self._finished if _common(entry, rows.ids, rows.computed) == entry.computed]:
            self._drop(older)
        self._finished[rows] = None
        self._tokens += len(rows.ids)
        while self._tokens > self._max_tokens and len(self._finished) > 1:
            self._drop(next(iter(self._finished)))

    def fill(self, rows: Rows, limit: int) -> int:
        """Copy the longest known prefix, at most `limit` positions, into `rows`; returns its length."""
        best, length = None, 0
        for entry in (*self._live, *self._finished):
            # An entry that beats the best one agrees with the prompt at the best one's end.
            if entry.computed > length < limit and entry.ids[length] == rows.ids[length]:
                common = _common(entry, rows.ids, limit)
                if common > length:
                    best, length = entry, common
        if best is not None:
            rows.copy_from(best, length)
            if best in self._finished:
                self._finished.move_to_end(best)
        return length

    def clear(self) -> None:
        """Forget everything, and take nothing more from the sequences in progress."""
        self._live.clear()
        self._finished.clear()
        self._tokens = 0

    def _drop(self, entry: Rows) -> None:
        del self._finished[entry]
        self._tokens -= len(entry.ids)


def _layer(rows: torch.Tensor) -> LayerRows:
    return rows, rows.numpy()


def _common(entry: Rows, ids: Ids, limit: int) -> int:
    """How many of the computed tokens of `entry` are also the first of `ids`, up to `limit`."""
    end = min(entry.computed, limit)
    different = entry.ids[:end] != ids[:end]
    return int(different.argmax()) if different.any() else end
