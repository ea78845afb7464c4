"""A path as one row, under the names that trainers have for its parts.

Owns these names and the cut between prompt and response. Pure. The response begins with the first token that was sampled, and
has everything after it, what the environment said with a loss mask of 0: `loss_mask` and `rollout_log_probs` are as long as
`response_ids`. Offsets are into the response.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from rollout_ft.samples.routed import array_of
from rollout_ft.types import JSON


def rows_of(trajectory: JSON, reward: float | None, outcome: str | None) -> list[JSON]:
    """One of each path: `prompt_ids` and `response_ids` (int32), `loss_mask` (int8), `rollout_log_probs` (float32, 0 where
    nothing was sampled) and, where they were asked for, `rollout_routed_experts` of shape (tokens - 1, layers, topk); reward,
    outcome, versions, sampling parameters of each turn, and where it all came from."""
    about = trajectory["metadata"]
    trial = {
        **{name: trajectory[name] for name in ("trial_id", "task_id", "group_id")}, "reward": reward, "outcome": outcome,
        "attempts": trajectory["attempt"], "turns_replayed": about["replayed"], "tokens_reused": about["tokens_reused"],
    }  # fmt: skip
    return [trial | {"path": i} | _path(each) for i, each in enumerate(trajectory["paths"])]


def _path(path: JSON) -> JSON:
    start, turns = path["turns"][0]["start"], path["turns"]
    ids = np.asarray(path["token_ids"], np.int32)
    spans = [_shifted(span, start) for span in path["version_spans"]]
    routed = path.get("routed_experts")
    return {
        "prompt_ids": ids[:start], "response_ids": ids[start:],
        "loss_mask": np.asarray(path["loss_mask"], np.int8)[start:],
        "rollout_log_probs": np.asarray(path["logprobs"], np.float32)[start:],
        "rollout_routed_experts": None if routed is None else array_of(routed),
        "version_spans": spans, "weight_versions": [version for version, _ in itertools.groupby(span["version"] for span in spans)],
        "turns": [_shifted(turn, start) for turn in turns],
        "continuations": sum(turn["generations"] - 1 for turn in turns),
        "uncertain_turns": sum(turn["evidence"] == "uncertain" for turn in turns),
        **{name: path[name] for name in ("finish_reason", "evidence", "resampled")},
    }  # fmt: skip


def _shifted(span: dict[str, Any], start: int) -> JSON:
    return {**span, "start": span["start"] - start, "end": span["end"] - start}
