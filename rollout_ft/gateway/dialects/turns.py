"""What a committed turn says about itself, for replies in every dialect.

Owns nothing but the reading of a turn's record. Pure: the same turn always gives the same values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from rollout_ft.session.render import Renderer
from rollout_ft.session.tree import Node, ids_of, path
from rollout_ft.types import JSON


def message(node: Node) -> JSON:
    """The assistant's message, as OpenAI writes it."""
    return orjson.loads(node.turn.reply)


def finish_reason(node: Node, message: JSON) -> str:
    """Why a turn ended, as OpenAI says it; `message` is the assistant's."""
    return "tool_calls" if message.get("tool_calls") and node.turn.finish_reason == "stop" else node.turn.finish_reason


def usage(node: Node) -> tuple[int, int]:
    """How many tokens the prompt and the output have."""
    completion = len(node.turn.output_ids) // 4
    return node.tokens - completion, completion


def prompt_ids(node: Node) -> list[int]:
    """All ids that the engine was given for this turn."""
    ids: list[int] = []
    for each in reversed(list(path(node))):
        if each.turn.trim:
            del ids[-each.turn.trim :]
        ids += ids_of(each.turn.prompt_ids)
        if each is not node:
            ids += ids_of(each.turn.output_ids)
    return ids


def token_logprobs(node: Node) -> list[tuple[int, float]]:
    """Each sampled id with the logprob of the engine that sampled it."""
    values: list[float] = np.frombuffer(node.turn.logprobs, dtype="<f4").tolist()
    return list(zip(ids_of(node.turn.output_ids), values, strict=True))


def text(node: Node, renderer: Renderer) -> str:
    """All that was sampled, a stop string included, the token that ended the turn left out."""
    ids = ids_of(node.turn.output_ids)
    return renderer.text(ids[:-1] if ids and ids[-1] in _stop_ids(node, renderer) else ids)


def matched(node: Node, renderer: Renderer) -> str | int | None:
    """What a turn stopped at: a stop string, a token, or None when it did not stop by itself."""
    if node.turn.finish_reason != "stop":
        return None
    sampled = text(node, renderer)
    found = [(sampled.find(s), s) for s in _sampling(node).get("stop") or () if s in sampled]
    if found:
        return min(found)[1]
    ids = ids_of(node.turn.output_ids)
    return ids[-1] if ids and ids[-1] in _stop_ids(node, renderer) else None


def meta_info(node: Node, finish: JSON) -> JSON:
    """What SGLang says about a generation, in its words; `finish` is how it ended, in its words too."""
    turn, (prompt, completion) = node.turn, usage(node)
    return {
        "id": turn.key,
        "finish_reason": finish,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "weight_version": turn.version_spans[-1].version if turn.version_spans else "",
        "weight_versions": [{"version": s.version, "start": s.start, "end": s.end} for s in turn.version_spans],
    }


def logprob_triples(node: Node) -> list[tuple[float, int, None]]:
    """Logprob, id and no text of each sampled token, as SGLang has them in `output_token_logprobs`."""
    return [(logprob, token, None) for token, logprob in token_logprobs(node)]


def finish(node: Node, renderer: Renderer) -> JSON:
    """How a turn ended, as SGLang says it."""
    if node.turn.finish_reason == "length":
        return {"type": "length", "length": len(node.turn.output_ids) // 4}
    return {"type": node.turn.finish_reason, "matched": matched(node, renderer)}


def _sampling(node: Node) -> JSON:
    return orjson.loads(node.turn.sampling)


def _stop_ids(node: Node, renderer: Renderer) -> frozenset[int]:
    given: Any = _sampling(node).get("stop_token_ids") or ()
    return renderer.stop_ids.union(given)
