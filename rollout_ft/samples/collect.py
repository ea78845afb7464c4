"""A session as the training samples that miles' driver collects.

Owns the layout on the wire: one safetensors file with `tokens.i`, `loss_mask.i`, `rollout_log_probs.i` and, where they are
wanted, `rollout_routed_experts.i` of sample i, and everything else as JSON in the tensor `_samples_meta`. Pure. A sample is
a path of the trajectory, cut between turns where its routed experts end, and in the middle of one where `max_seq_len` does.

The subtle invariant: every sample ends with a token that was sampled, so that the next forward pass needs nothing that is
not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from safetensors.numpy import save

from rollout_ft.errors import RolloutFTError
from rollout_ft.samples.routed import array_of
from rollout_ft.samples.rows import rows_of
from rollout_ft.types import JSON

META = "_samples_meta"
NO_RECORDS, ALL_TRUNCATED = "no_records", "all_truncated"
_OWN = ("accumulated_token_ids", "max_trim_tokens", "tito_session_mismatch", "leaf", "rollout_ft")
"""What is ours to say of a sample, whatever the agent says."""
_WIRE = {"tokens": np.int64, "loss_mask": np.uint8, "rollout_log_probs": np.float64, "rollout_routed_experts": np.int32}


class Unassembled(RolloutFTError):
    """What was recorded makes no sample; repeating the request cannot help (HTTP 422)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a driver says with its request. `metadata` is the agent's: its `reward`, and what it notes beside."""

    max_seq_len: int | None = None
    metadata: JSON = field(default_factory=dict[str, Any])


def samples_body(trajectory: JSON, wanted: Wanted, text: Callable[[list[int]], str], *, tainted: bool, max_trim_tokens: int) -> bytes:
    """The file. A `tainted` attempt has samples that are aborted and masked, and no reward. Raises Unassembled."""
    paths: list[JSON] = trajectory["paths"]
    kept = [cut for cut in (cut(path, wanted.max_seq_len) for path in paths) if cut is not None]
    rows = rows_of({**trajectory, "paths": kept}, None, None)
    arrays = [_arrays(path, row, tainted) for path, row in zip(kept, rows, strict=True)]
    metas = [_meta(path, row, wanted.metadata, text, tainted) for path, row in zip(kept, rows, strict=True)]
    meta: JSON = {
        "samples": [
            each | {"nulls": [*(_WIRE.keys() - own.keys()), "rollout_indexer_topk"]} for each, own in zip(metas, arrays, strict=True)
        ],
        "session_metadata": _session(trajectory, wanted.metadata, max_trim_tokens, tainted),
        "empty_reason": None if metas else ALL_TRUNCATED if paths else NO_RECORDS,
    }
    tensors = {f"{name}.{i}": array for i, own in enumerate(arrays) for name, array in own.items()}
    return save({**tensors, META: np.frombuffer(orjson.dumps(meta, option=orjson.OPT_SERIALIZE_NUMPY), np.uint8)})


def cut(path: JSON, max_seq_len: int | None) -> JSON | None:
    """The path as far as it can be trained; None where nothing is left that is trained here. Raises Unassembled when that is
    for want of routed experts."""
    known = _known(path)
    turns = [turn for turn in path["turns"] if turn["end"] <= known]
    if not turns:
        raise Unassembled(f"routed experts are missing from row {known - 1} on, which is in the first turn")
    whole = turns[-1]["end"]
    within = [turn for turn in turns if max_seq_len is None or turn["start"] < max_seq_len]
    if not within:
        return None
    end = min(within[-1]["end"], max_seq_len or whole)
    if end == len(path["token_ids"]):
        return path
    loss_mask = path["loss_mask"][:end]
    if not np.any(loss_mask):  # what is left of it is trained by another path
        return None
    last = within[-1]
    finish = "length" if end < last["end"] else last["finish_reason"]
    routed = path.get("routed_experts")
    return {
        **path, "token_ids": path["token_ids"][:end], "loss_mask": loss_mask, "logprobs": path["logprobs"][:end],
        "turns": [*within[:-1], {**last, "end": end, "finish_reason": finish}], "finish_reason": finish,
        "version_spans": [{**span, "end": min(span["end"], end)} for span in path["version_spans"] if span["start"] < end],
        **({"routed_experts": array_of(routed)[: end - 1]} if routed is not None else {}),
    }  # fmt: skip


def _known(path: JSON) -> int:
    """How many of a path's tokens can be there for every row of its routed experts to be there too."""
    missing = path.get("routed_experts_missing")
    return missing[0][0] + 1 if missing else len(path["token_ids"])


def _session(trajectory: JSON, agent: JSON, max_trim_tokens: int, tainted: bool) -> JSON:
    """What is said of all samples together."""
    paths: list[JSON] = trajectory["paths"]
    ours = {name: trajectory[name] for name in ("session_id", "trial_id", "attempt", "metadata")}
    return {
        "accumulated_token_ids": paths[-1]["token_ids"] if paths else [], "max_trim_tokens": max_trim_tokens,
        "rollout_ft": {**ours, "tainted": tainted}, **({"agent": agent} if agent else {}),
    }  # fmt: skip


def _arrays(path: JSON, row: JSON, tainted: bool) -> dict[str, Any]:
    loss_mask = np.zeros_like(row["loss_mask"]) if tainted else row["loss_mask"]
    found = {**row, "tokens": path["token_ids"], "loss_mask": loss_mask}
    return {name: np.ascontiguousarray(found[name], dtype) for name, dtype in _WIRE.items() if found[name] is not None}


def _meta(path: JSON, row: JSON, agent: JSON, text: Callable[[list[int]], str], tainted: bool) -> JSON:
    status = "aborted" if tainted else "truncated" if path["finish_reason"] == "length" else "completed"
    told = {key: value for key, value in agent.items() if key not in _OWN}
    ours = ("trial_id", "path", "attempts", "turns_replayed", "tokens_reused", "continuations", "uncertain_turns", "evidence", "resampled")
    return {
        "response": text(row["response_ids"].tolist()), "response_length": len(row["response_ids"]), "status": status,
        "weight_versions": row["weight_versions"], "prefix_cache_info": {"cached_tokens": 0, "total_prompt_tokens": 0},
        "metadata": {**told, "rollout_ft": {name: row[name] for name in ours}}, "reward": None if tainted else agent.get("reward"),
    }  # fmt: skip
