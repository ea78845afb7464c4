"""Samples as one parquet file, a row a path.

Owns its columns. Needs pyarrow, which is imported when a file is written. A file is there whole or not at all; a group of
rows is a trial, so that none has to be in memory with another.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from rollout_ft.disk import whole
from rollout_ft.errors import ConfigError
from rollout_ft.types import JSON


def write_parquet(path: Path, trials: Iterable[list[JSON]]) -> int:
    """Writes the rows (`samples.rows`) of one trial after the other; how many these were. Raises ConfigError without pyarrow."""
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError("a parquet file needs pyarrow: pip install 'rollout-ft[parquet]'") from None
    schema, written = _schema(arrow), 0
    with whole(path) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for rows in trials:
            writer.write_table(arrow.Table.from_pylist([_stored(row) for row in rows], schema=schema))
            written += len(rows)
    return written


def _schema(pa: Any) -> Any:
    span = [("start", pa.int32()), ("end", pa.int32())]
    turn = [("turn", pa.string()), *span, ("evidence", pa.string()), ("finish_reason", pa.string()), ("sampling", pa.string()),
            ("generations", pa.int32())]  # fmt: skip
    return pa.schema(
        [
            *((name, pa.string()) for name in ("trial_id", "task_id", "group_id")), ("path", pa.int32()), ("outcome", pa.string()),
            ("reward", pa.float64()), ("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.int8())), ("rollout_log_probs", pa.list_(pa.float32())),
            ("weight_versions", pa.list_(pa.string())), ("version_spans", pa.list_(pa.struct([("version", pa.string()), *span]))),
            ("finish_reason", pa.string()), ("evidence", pa.string()), ("resampled", pa.bool_()), ("turns", pa.list_(pa.struct(turn))),
            ("attempts", pa.int32()), ("turns_replayed", pa.int32()), ("tokens_reused", pa.int64()), ("continuations", pa.int32()),
            ("uncertain_turns", pa.int32()), ("rollout_routed_experts", pa.binary()), ("routed_experts_dtype", pa.string()),
            ("routed_experts_shape", pa.list_(pa.int32())),
        ]
    )  # fmt: skip


def _stored(row: JSON) -> JSON:
    """The routed experts as little-endian bytes, the sampling parameters as JSON: their keys differ from turn to turn."""
    routed: Any = row["rollout_routed_experts"]
    turns = [{**turn, "sampling": orjson.dumps(turn["sampling"]).decode()} for turn in row["turns"]]
    if routed is None:
        return {**row, "turns": turns}
    little = np.ascontiguousarray(routed, routed.dtype.newbyteorder("<"))
    shape = {"routed_experts_dtype": routed.dtype.name, "routed_experts_shape": list(routed.shape)}
    return {**row, "turns": turns, "rollout_routed_experts": little.tobytes(), **shape}
