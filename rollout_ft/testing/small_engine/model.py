"""What the scheduler asks of a model: the port that the transformer and the hash model both fill.

Owns the interface and the sampling settings a model sees. Must not know how tokens travel, when they are due or why a
request ends. The subtle invariant every model keeps: a token and its logprob depend on the tokens before it, the
weights and the sampling settings, and on nothing else: not on the prompt's length, the batch, the sizes of the steps
or the cache. A generation that is cut and continued elsewhere gives the same tokens for that reason alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token; `temperature` 0 is greedy. `stops` end a burst, `banned` are not sampled at all."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    ignore_eos: bool
    stops: frozenset[int]


class Generation(Protocol):
    """One sequence that a model works on."""

    cached_tokens: int

    def prefill(self, budget: int) -> bool:
        """Compute up to `budget` positions of the prompt; True when sampling can begin."""
        ...

    def sample(self, count: int, banned: frozenset[int]) -> tuple[list[int], list[float]]:
        """Up to `count` tokens and their logprobs, none after a stop; at least one."""
        ...

    def close(self) -> None:
        """The sequence ends here; what was computed may serve as a prefix of others."""
        ...


class Model(Protocol):
    """Weights and what they compute."""

    burst: int
    """Tokens of one sequence between two looks at the network (and at the other sequences)."""

    def load(self, seed: str, file: bytes | None = None) -> None:
        """Take the weights that `seed` names: equal seeds are equal weights, on every machine of one kind. A file of weights
        is named by its digest, and may be read instead. Raises ValueError for one that does not fit."""
        ...

    def start(self, prompt: Ids, sampling: Sampling) -> Generation: ...

    def score(self, prompt: Ids, sampling: Sampling) -> list[float | None]:
        """What the logprob of each token of `prompt` would be had it been sampled; None for the first."""
        ...

    def forget(self) -> None:
        """Drop cached prefixes."""
        ...


def mix64(value: int) -> int:
    """A 64-bit finaliser (splitmix64): every bit of the input moves every bit of the output."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)
