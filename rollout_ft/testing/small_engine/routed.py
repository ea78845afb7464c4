"""Routed experts of a model that has none: a hash of the tokens, in SGLang's shape.

Owns the rows. Row i is a function of the tokens up to i and of nothing else: not of the prompt's length, the engine or the
call, so that a test can say what every row of a path has to be, whoever captured it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollout_ft.testing.small_engine.model import MASK64, Ids

_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class Experts:
    layers: int
    topk: int
    count: int

    def rows(self, ids: Ids) -> NDArray[np.int32]:
        """One row of (layers, topk) for every token; the experts of one layer are different ones."""
        powers = np.full(len(ids), _BASE, np.uint64)
        powers[:1] = 1
        inverse = np.full(len(ids), pow(_BASE, -1, MASK64 + 1), np.uint64)
        inverse[:1] = 1
        terms = (ids.astype(np.uint64) + np.uint64(1)) * np.cumprod(inverse, dtype=np.uint64)
        state = np.cumsum(terms, dtype=np.uint64) * np.cumprod(powers, dtype=np.uint64)
        mixed = (state[:, None] ^ np.arange(1, self.layers + 1, dtype=np.uint64) * np.uint64(_BASE)) * _MIX
        first = (mixed >> np.uint64(33)).astype(np.int64)
        return ((first[:, :, None] + np.arange(self.topk)) % self.count).astype(np.int32)

    def encoded(self, ids: Ids, start: int) -> str:
        """As SGLang sends it: rows `start` to the last but one, none for the last token, as base64 of int32."""
        return base64.b64encode(self.rows(ids)[start : len(ids) - 1].astype("<i4").tobytes()).decode()
