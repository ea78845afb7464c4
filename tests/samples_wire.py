"""What miles' driver makes of an answer to `POST …/samples`: read as it reads it, refused where it refuses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from safetensors.numpy import load

TENSORS = {
    "tokens": "int64", "loss_mask": "uint8", "rollout_log_probs": "float64", "rollout_routed_experts": "int32",
    "rollout_indexer_topk": "int32",
}  # fmt: skip
VALUES = ("response", "response_length", "status", "weight_versions", "prefix_cache_info", "metadata", "reward")


@dataclass(frozen=True, slots=True)
class Reply:
    samples: list[dict[str, Any]]
    session: dict[str, Any]
    empty_reason: str | None


def read(payload: bytes) -> Reply:
    """Every promised tensor is there in its type, and none beside; a sample is as long as it says."""
    tensors = load(payload)
    meta_tensor = tensors.pop("_samples_meta")
    assert (meta_tensor.ndim, meta_tensor.dtype) == (1, np.uint8)
    meta = orjson.loads(meta_tensor.tobytes())
    samples: list[dict[str, Any]] = []
    for i, told in enumerate(meta["samples"]):
        nulls = set(told["nulls"])
        assert nulls <= TENSORS.keys()
        sample = {name: told[name] for name in VALUES}
        for name, dtype in TENSORS.items():
            sample[name] = None if name in nulls else tensors.pop(f"{name}.{i}")
            assert sample[name] is None or sample[name].dtype == dtype
        assert sample["status"] in ("completed", "truncated", "aborted", "failed")
        assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"]) == sample["response_length"] <= len(sample["tokens"])
        if sample["rollout_routed_experts"] is not None:
            assert len(sample["rollout_routed_experts"]) == len(sample["tokens"]) - 1
        samples.append(sample)
    assert not tensors
    return Reply(samples, meta["session_metadata"], meta["empty_reason"])
