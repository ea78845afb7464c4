"""A small transformer in torch on the CPU: two layers, width 64, four query heads that share one key and value head.

Owns the weights and the computation of one position. Must not know of requests, time or HTTP. The subtle invariant:
every position, of a prompt or of an output, is computed alone, in one fixed shape on one thread, over rows that begin
at row 0 of their tensors. A product of 1 row and one of 64 rows differ in the last bits; here there is only the one,
so a logit depends on the tokens before it and on nothing else. The order of the operations is part of it.

Attention and the feed-forward part of a layer work on the same input and share their matrices: few operations, since
at this size the cost of an operation is that of calling it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load

from rollout_ft.testing.small_engine.model import Ids, Sampling
from rollout_ft.testing.small_engine.prefix_cache import LayerRows, PrefixCache, Rows
from rollout_ft.testing.small_engine.prior import Prior, State
from rollout_ft.testing.small_engine.sampling import choose
from rollout_ft.testing.small_engine.vocabulary import Vocabulary

_LAYERS = 2
_WIDTH = 64
_HEADS = 4
_HEAD = 16
_HIDDEN = 128
_KEY_VALUE = 2 * _HEAD
_SHAPE = (_WIDTH,)
_NEVER = -1e9
_CACHED_TOKENS = 262_144

Logprobs = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Weights:
    """All numbers of the model: drawn from a generator that is seeded with a name, or read from a file."""

    embedding: torch.Tensor
    unembedding: torch.Tensor
    into: list[torch.Tensor]
    out: list[torch.Tensor]


def make_weights(seed: str, vocabulary_size: int) -> Weights:
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(seed.encode()).digest()[:7], "little"))

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    return Weights(
        embedding=normal(vocabulary_size, _WIDTH, 1.0).view(vocabulary_size, 1, _WIDTH),
        unembedding=normal(_WIDTH, vocabulary_size, 1.2 * _WIDTH**-0.5),
        into=[normal(_WIDTH, _KEY_VALUE + _WIDTH + _HIDDEN, _WIDTH**-0.5) for _ in range(_LAYERS)],
        out=[normal(_WIDTH + _HIDDEN, _WIDTH, _WIDTH**-0.5) for _ in range(_LAYERS)],
    )


def read_weights(file: bytes, vocabulary_size: int) -> Weights:
    """The weights in a safetensors file, under the names of their fields. Raises ValueError for what this model cannot take."""
    likes = _named(make_weights("", vocabulary_size))
    try:
        found = load(file)
    except SafetensorError as e:
        raise ValueError(f"model.safetensors cannot be read: {e}") from e
    for name, like in likes.items():
        tensor = found.get(name)
        if tensor is None or tensor.dtype != torch.float32 or tensor.numel() != like.numel() or tensor.shape[-1] != like.shape[-1]:
            has = "is missing" if tensor is None else f"is {tensor.dtype} of {tuple(tensor.shape)}"
            raise ValueError(f"{name} of model.safetensors {has}; this model has float32 of {tuple(like.shape)}")
    # Copied, since the file's tensors begin anywhere in memory, and a product may round by where its operands begin.
    taken = {name: found[name].reshape(like.shape).clone() for name, like in likes.items()}
    into, out = ([taken[f"{part}.{i}"] for i in range(_LAYERS)] for part in ("into", "out"))
    return Weights(taken["embedding"], taken["unembedding"], into, out)


def _named(weights: Weights) -> dict[str, torch.Tensor]:
    layers = {f"{part}.{i}": tensor for part in ("into", "out") for i, tensor in enumerate(getattr(weights, part))}
    return {"embedding": weights.embedding, "unembedding": weights.unembedding, **layers}


class Transformer:
    """The weights, the scratch of one position, and the prefix cache."""

    burst = 1

    def __init__(self, vocabulary: Vocabulary) -> None:
        torch.set_num_threads(1)
        self.prior = Prior(vocabulary)
        self.cache = PrefixCache(_CACHED_TOKENS)
        self._size = vocabulary.size
        self.weights = make_weights("", self._size)
        self._biases = [torch.as_tensor(row).view(1, -1) for row in self.prior.biases]
        # What a layer makes of its input, in one product: [key, value | query | hidden]. The attention's result takes
        # the query's place, so that [result | hidden] is one row for the second product.
        scratch = torch.zeros(1, _KEY_VALUE + _WIDTH + _HIDDEN)
        self._scratch = scratch
        # Copies and the activation go through numpy, over the same memory: a call costs a tenth of torch's.
        self._key_value = scratch.numpy()[0, :_KEY_VALUE]
        self._hidden = scratch.numpy()[0, _KEY_VALUE + _WIDTH :]
        self._query = scratch[:, _KEY_VALUE : _KEY_VALUE + _WIDTH].view(_HEADS, _HEAD)
        self._result = scratch[:, _KEY_VALUE:]

    def load(self, seed: str, file: bytes | None = None) -> None:
        self.weights = make_weights(seed, self._size) if file is None else read_weights(file, self._size)
        self.cache.clear()

    def forget(self) -> None:
        self.cache.clear()

    def start(self, prompt: Ids, sampling: Sampling) -> Sequence:
        return Sequence(self, prompt, sampling)

    @torch.inference_mode()
    def score(self, prompt: Ids, sampling: Sampling) -> list[float | None]:
        rows, scores = Rows(prompt, _LAYERS, _KEY_VALUE), list[float | None]([None])
        for index, token in enumerate(prompt[1:].tolist()):
            x = self.position(int(prompt[index]), index, rows.layers)
            state = self.prior.start(prompt[: index + 1].tolist())
            forced = self.prior.forced(state)
            certain = 0.0 if forced == token else _NEVER
            scores.append(float(self.logprobs(x, state, sampling.temperature, frozenset())[token]) if forced is None else certain)
        return scores

    def position(self, token: int, index: int, layers: list[LayerRows]) -> torch.Tensor:
        """Compute position `index`: its keys and values go to `layers`; returns what its logits are made of."""
        weights, count, query, hidden = self.weights, index + 1, self._query, self._hidden
        x = weights.embedding[token]
        for (rows, row_array), into, out in zip(layers, weights.into, weights.out, strict=True):
            torch.mm(torch.layer_norm(x, _SHAPE), into, out=self._scratch)
            row_array[index] = self._key_value
            np.maximum(hidden, 0.0, out=hidden)
            keys = torch.as_strided(rows, (_HEAD, count), (1, _KEY_VALUE))
            values = torch.as_strided(rows, (count, _HEAD), (_KEY_VALUE, 1), _HEAD)
            torch.mm(torch.softmax(torch.mm(query, keys), -1), values, out=query)
            x = torch.addmm(x, self._result, out)
        return x

    def logprobs(self, x: torch.Tensor, state: State, temperature: float, banned: frozenset[int]) -> Logprobs:
        """The distribution after the position that made `x`."""
        bias = self._biases[self.prior.bias(state)]
        logits = torch.addmm(bias, torch.layer_norm(x, _SHAPE), self.weights.unembedding)
        if banned:
            logits[0, list(banned)] = -torch.inf
        if temperature > 0 and temperature != 1:
            logits = logits / temperature
        return torch.log_softmax(logits, -1)[0].numpy()


class Sequence:
    """One sequence: its rows, where the prior is in it, and the next position to compute."""

    def __init__(self, model: Transformer, prompt: Ids, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self._weights = model.weights
        self._rows = Rows(prompt, _LAYERS, _KEY_VALUE)
        self._state = model.prior.start(prompt.tolist())
        # The last position is always computed here: the first token is sampled from it.
        self.cached_tokens = model.cache.fill(self._rows, len(prompt) - 1)
        model.cache.add(self._rows)

    @torch.inference_mode()
    def prefill(self, budget: int) -> bool:
        last = self._rows.length - 1
        for _ in range(min(budget, last - self._rows.computed)):
            self._compute()
        return self._rows.computed >= last

    @torch.inference_mode()
    def sample(self, count: int, banned: frozenset[int]) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        logprobs: list[float] = []
        for _ in range(count):
            x = self._compute()
            forced = self._model.prior.forced(self._state)
            token, logprob = (forced, 0.0) if forced is not None else self._choose(x, banned)
            tokens.append(token)
            logprobs.append(logprob)
            self._state = self._model.prior.advance(self._state, token)
            self._rows.append(token)
            if token in self._sampling.stops:
                break
        return tokens, logprobs

    def close(self) -> None:
        # After an update in place the older rows are those of the older weights.
        self._model.cache.finish(self._rows, keep=self._weights is self._model.weights)

    def _compute(self) -> torch.Tensor:
        rows = self._rows
        index = rows.computed
        x = self._model.position(int(rows.ids[index]), index, rows.layers)
        rows.computed = index + 1
        return x

    def _choose(self, x: torch.Tensor, banned: frozenset[int]) -> tuple[int, float]:
        logprobs = self._model.logprobs(x, self._state, self._sampling.temperature, banned)
        token = choose(np.exp(logprobs), self._sampling, self._rows.length)
        return token, float(logprobs[token])
