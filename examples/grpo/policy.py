"""The small engine's transformer as a torch module: the same numbers, all positions of a batch at once, and gradients.

Owns the computation, and the file that the engine loads. A trainer of its own has its own model here, and writes the
checkpoint that its engines load. Logits are the engine's up to 1e-5: a product of many rows rounds otherwise than one of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.testing.small_engine.prior import Prior
from rollout_ft.testing.small_engine.transformer import make_weights
from rollout_ft.testing.small_engine.vocabulary import load_vocabulary

WIDTH, HEADS, HEAD = 64, 4, 16


class Policy(nn.Module):
    def __init__(self, seed: str):
        super().__init__()
        vocabulary = load_vocabulary(MODEL_DIR)
        weights = make_weights(seed, vocabulary.size)
        self.embedding = nn.Parameter(weights.embedding.view(-1, WIDTH))
        self.unembedding = nn.Parameter(weights.unembedding)
        self.into, self.out = nn.ParameterList(weights.into), nn.ParameterList(weights.out)
        self._prior = Prior(vocabulary)
        self._biases = torch.stack([torch.as_tensor(row) for row in self._prior.biases])

    def forward(self, ids: Tensor) -> Tensor:
        """`[batch, length]` token ids, padded on the right → `[batch, length, width]`, what the next token's logits are made of."""
        batch, length = ids.shape
        future = torch.full((length, length), -torch.inf).triu(1)
        x = self.embedding[ids]
        for into, out in zip(self.into, self.out, strict=True):
            key, value, query, hidden = (layer_norm(x, (WIDTH,)) @ into).split([HEAD, HEAD, HEADS * HEAD, 2 * WIDTH], -1)
            heads = query.view(batch, length, HEADS, HEAD).transpose(1, 2)
            attention = (heads @ key.unsqueeze(1).transpose(2, 3) + future).softmax(-1)
            result = (attention @ value.unsqueeze(1)).transpose(1, 2).reshape(batch, length, HEADS * HEAD)
            x = x + torch.cat([result, hidden.relu()], -1) @ out
        return layer_norm(x, (WIDTH,))

    def logprobs(self, ids: Tensor) -> Tensor:
        """`[batch, length - 1]`: the logprob of each token after the ones before it."""
        picked = self(ids)[:, :-1] @ self.unembedding + self.bias(ids)[:, :-1]
        return picked.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def bias(self, ids: Tensor) -> Tensor:
        """What the engine adds to the logits, so that random weights sound like an agent: no part of what is trained."""
        rows: list[list[int]] = []
        for sequence in ids.tolist():
            state, row = self._prior.start([]), list[int]()
            for token in sequence:
                state = self._prior.advance(state, token)
                row.append(self._prior.bias(state))
            rows.append(row)
        return self._biases[torch.tensor(rows)]
