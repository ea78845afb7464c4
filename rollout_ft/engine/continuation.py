"""What of an unfinished generation another engine can go on from.

Owns the preconditions and corrections of a continuation. Pure. What cannot be continued faithfully is generated again
from the prompt: the state of a grammar, of a thinking budget or of a logits processor dies with the engine, penalties count
only the tokens of their own request, and what a regular expression stops at may have begun anywhere. Several samples or
beams in one request are no single list of tokens. A bias of logits has no state and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from rollout_ft.types import JSON, VersionSpan

_WITH_STATE = (
    "json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "custom_params", "custom_logit_processor", "max_thinking_tokens",
)  # fmt: skip
_NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "n": 1, "beam_width": 1}


@dataclass(frozen=True, slots=True)
class Start:
    """Keep the first `keep` tokens; `finish` is set when nothing remains to be generated."""

    keep: int
    finish: Literal["", "stop", "length"] = ""


def start_from(ids: Sequence[int], *, sampling: JSON, stop_ids: Set[int], max_new_tokens: int) -> Start:
    """Where a generation that has `ids` goes on."""
    ids = ids[:max_new_tokens]
    if ids and ids[-1] in stop_ids and not sampling.get("ignore_eos"):
        return Start(len(ids), "stop")
    if len(ids) >= max_new_tokens:
        return Start(max_new_tokens, "length")
    if any(sampling.get(key) is not None for key in _WITH_STATE):
        return Start(0)
    if any(sampling.get(key) not in (None, neutral) for key, neutral in _NEUTRAL.items()):
        return Start(0)
    # A stop string that began before the break would be missed: go back by its longest possible tail, a token
    # being at least one byte.
    tail = max((len(s.encode()) for s in sampling.get("stop") or ()), default=0)
    return Start(max(0, len(ids) - tail))


def cut_spans(spans: Sequence[VersionSpan], keep: int) -> list[VersionSpan]:
    """The spans of the first `keep` tokens."""
    return [VersionSpan(s.version, s.start, min(s.end, keep)) for s in spans if s.start < keep]


def join_spans(before: Sequence[VersionSpan], after: Sequence[VersionSpan], offset: int, end: int) -> tuple[VersionSpan, ...]:
    """`after` counts from `offset`; neighbours of one version become one span; all ends at `end`."""
    joined = list(before)
    for span in after:
        moved = VersionSpan(span.version, span.start + offset, min(span.end + offset, end))
        if moved.start >= moved.end:
            continue
        if joined and joined[-1].version == moved.version and joined[-1].end == moved.start:
            moved = VersionSpan(moved.version, joined.pop().start, moved.end)
        joined.append(moved)
    return tuple(joined)
