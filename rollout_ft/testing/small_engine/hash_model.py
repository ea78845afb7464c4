"""A model without weights: the next token is a hash of the tokens before it.

Owns the hash and nothing else; needs no torch. The subtle invariant: the hash of prompt + output is the hash that the
output was sampled from, so the state is a polynomial in the token ids modulo 2**64, which numpy computes for a whole
prompt at once and a multiplication extends by one token.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from rollout_ft.testing.small_engine.model import MASK64, Ids, Sampling, mix64
from rollout_ft.testing.small_engine.vocabulary import Vocabulary

_BASE = 0x9E3779B97F4A7C15
_EOS_IN_16384 = 16
_UNLIKELY = -8.0
_LOGPROBS = tuple(-step / 256 for step in range(1, 1025))


@lru_cache(maxsize=4)
def _powers(count: int) -> NDArray[np.uint64]:
    """`_BASE` to the powers count-1, …, 1, 0."""
    powers = np.full(count, _BASE, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)[::-1]


class HashModel:
    """Tokens of printable ASCII, logprobs in steps of 1/256 (exact in float32, short in JSON)."""

    burst = 256

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.text_ids = vocabulary.printable
        self.eos_id = vocabulary.eos_id
        self.weights = 0
        self._powers = _powers(vocabulary.context_length + 1)

    def load(self, seed: str, file: bytes | None = None) -> None:
        """Of a file its name is enough: another file is another hash."""
        self.weights = int.from_bytes(sha256(seed.encode()).digest()[:8], "little")

    def start(self, prompt: Ids, sampling: Sampling) -> HashGeneration:
        powers = self._powers if len(prompt) <= len(self._powers) else _powers(len(prompt))
        terms = (prompt.astype(np.uint64) + np.uint64(1)) * powers[len(powers) - len(prompt) :]
        return HashGeneration(self, int(terms.sum(dtype=np.uint64)), sampling)

    def score(self, prompt: Ids, sampling: Sampling) -> list[float | None]:
        """A token that would not have been sampled is an unlikely one."""
        scores: list[float | None] = [None]
        for end in range(1, len(prompt)):
            (token,), (logprob,) = self.start(prompt[:end], sampling).sample(1, frozenset())
            scores.append(logprob if token == prompt[end] else _UNLIKELY)
        return scores

    def forget(self) -> None:
        """There is nothing to drop."""


class HashGeneration:
    """The state of one sequence: a 64-bit number."""

    cached_tokens = 0

    def __init__(self, model: HashModel, state: int, sampling: Sampling) -> None:
        self._model = model
        self._state = state
        self._stops = sampling.stops
        self._ignore_eos = sampling.ignore_eos
        self._seed = mix64(sampling.seed + 1) if sampling.temperature > 0 else 0

    def prefill(self, budget: int) -> bool:
        return True

    def sample(self, count: int, banned: frozenset[int]) -> tuple[list[int], list[float]]:
        text_ids, eos_id, stops, state = self._model.text_ids, self._model.eos_id, self._stops, self._state
        if banned:
            text_ids = tuple(token for token in text_ids if token not in banned)
        key, choices = self._model.weights ^ self._seed, len(text_ids)
        eos_below = 0 if self._ignore_eos or eos_id in banned else _EOS_IN_16384
        tokens: list[int] = []
        logprobs: list[float] = []
        for _ in range(count):
            # Two multiplications, and no call: whatever is done here is most of what a token costs.
            bits = ((state ^ key) * 0xBF58476D1CE4E5B9) & MASK64
            bits = ((bits ^ (bits >> 32)) * 0x94D049BB133111EB) & MASK64
            token = eos_id if (bits >> 16) & 16383 < eos_below else text_ids[(bits >> 40) * choices >> 24]
            tokens.append(token)
            logprobs.append(_LOGPROBS[(bits >> 30) & 1023])
            state = (state * _BASE + token + 1) & MASK64
            if token in stops:
                break
        self._state = state
        return tokens, logprobs

    def close(self) -> None:
        """Nothing was computed that another sequence could use."""
