"""Choosing a token from logits.

Owns the noise and the filters. Must not know of weights or requests. The subtle invariant: the noise of a position is
a hash of (seed, position) alone, position being the token's index in the whole sequence. A continuation, whose prompt
holds the earlier output, draws the same noise. One uniform number against the cumulated probabilities is enough for
that: noise for every entry of the vocabulary would cost as much as the model.

As in SGLang the logprob is that of the distribution at the request's temperature, before top-k, top-p and min-p; at
temperature 0 it is that at temperature 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rollout_ft.testing.small_engine.model import MASK64, Sampling, mix64

Floats = NDArray[np.float32]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), in steps of 2**-32: so far below 1 that rounding cannot carry a product up to the total."""
    return (mix64((mix64(seed & MASK64) + position) & MASK64) >> 32) / 4294967296


def choose(probabilities: Floats, sampling: Sampling, position: int) -> int:
    """The token at `position`."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        return int(probabilities.argmax())
    if sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0:
        probabilities = _filtered(probabilities, sampling)
    cumulated = probabilities.cumsum()
    point = uniform(sampling.seed, position) * float(cumulated[-1])
    return int(cumulated.searchsorted(point, side="right"))


def _filtered(probabilities: Floats, sampling: Sampling) -> Floats:
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    keep = ranked >= sampling.min_p * ranked[0]
    if sampling.top_k > 0:
        keep[sampling.top_k :] = False
    # A token stays while the mass before it is below top_p: the first one always does.
    keep &= ranked.cumsum(dtype=np.float64) - ranked < sampling.top_p
    keep[0] = True
    kept = np.zeros_like(probabilities)
    kept[order[keep]] = ranked[keep]
    return kept
