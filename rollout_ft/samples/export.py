"""Trajectories as files that trainers load without this package.

Owns the layout: one safetensors file a trial; per path i the tensors `{i}.token_ids` (int32), `{i}.loss_mask` (int8),
`{i}.logprobs` (float32) and, where they are wanted, `{i}.routed_experts` (uint8 or uint16), and everything else as JSON
under the key `trial` of the file's metadata. A file is there whole or not at all, and on disk: the stores forget a trial once
it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
from safetensors import safe_open
from safetensors.numpy import save

from rollout_ft.disk import whole
from rollout_ft.samples.routed import array_of
from rollout_ft.types import JSON

ROUTED = "routed_experts"
_DTYPES = {"token_ids": np.int32, "loss_mask": np.int8, "logprobs": np.float32}


def read_trajectory(path: Path) -> JSON:
    """What was written, with arrays where it has tensors, and its `reward`."""
    with cast(Any, safe_open)(path, "np") as opened:
        trajectory: JSON = orjson.loads(opened.metadata()["trial"])
        for key in sorted(opened.keys()):
            i, name = key.split(".")
            trajectory["paths"][int(i)][name] = opened.get_tensor(key)
    return trajectory


def write_trajectory(path: Path, trajectory: JSON, reward: float | None) -> None:
    tensors = {
        f"{i}.{name}": np.asarray(each[name], dtype=dtype) for i, each in enumerate(trajectory["paths"]) for name, dtype in _DTYPES.items()
    }
    routed = {i: array_of(each[ROUTED]) for i, each in enumerate(trajectory["paths"]) if each.get(ROUTED) is not None}
    tensors |= {f"{i}.{ROUTED}": rows for i, rows in routed.items()}
    rest = {k: v for k, v in trajectory.items() if k != "paths"} | {
        "reward": reward,
        "paths": [{k: v for k, v in each.items() if k not in _DTYPES and k != ROUTED} for each in trajectory["paths"]],
    }
    with whole(path) as temporary:
        temporary.write_bytes(save(tensors, {"trial": orjson.dumps(rest).decode()}))
