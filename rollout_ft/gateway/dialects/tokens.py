"""SGLang's `/generate`, for trainers and agents that work in tokens: a body to a request, a turn to a reply.

Owns the dialect in both directions. Pure. Ids are checked against the vocabulary here, because one that it does not have
ends a whole engine. A `rid` is the client's own label and comes back as the reply's id; the engine never sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.dialects import turns
from rollout_ft.gateway.dialects.base import Evidence, Rules
from rollout_ft.gateway.dialects.fields import own_session, refuse_unknown, refuse_unless, typed
from rollout_ft.gateway.dialects.sampling import TOKENS, read, settle
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node, ids_bytes, ids_of
from rollout_ft.types import Raw

_ONLY: dict[str, tuple[Any, ...]] = {
    "text": (), "image_data": (), "video_data": (), "audio_data": (), "logprob_start_len": (-1,), "top_logprobs_num": (0,),
    "token_ids_logprob": (), "return_text_in_logprobs": (False,), "return_routed_experts": (False,), "return_hidden_states": (False,),
}  # fmt: skip
_KNOWN = _ONLY.keys() | {"input_ids", "sampling_params", "stream", "return_logprob", "rid", "session_id"}
_FORM_ONLY = frozenset({"no_stop_trim", "skip_special_tokens", "spaces_between_special_tokens", "stream_interval"})
"""These shape only `text` and the chunks, never the tokens. Special tokens are always left out of `text`."""
_ONLY_PARAMS: dict[str, tuple[Any, ...]] = {
    "n": (1,), "json_schema": (), "regex": (), "ebnf": (), "structural_tag": (), "stop_regex": (), "logit_bias": (),
    "custom_params": (), "beam_width": (), "watermark": (),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokensRequest:
    """A request and what only its reply's form depends on."""

    turn: TurnRequest
    stream: bool = False
    return_logprob: bool = False
    no_stop_trim: bool = False
    rid: str = ""

    def reply(self, node: Node, renderer: Renderer) -> bytes:
        body = reply_body(node, self, renderer)
        return b"data: " + body + b"\n\ndata: [DONE]\n\n" if self.stream else body


def parse_generate(body: Raw, evidence: Evidence, rules: Rules) -> TokensRequest:
    """Raises BadRequest naming the field and the remedy."""
    data = rules.load(body)
    refuse_unknown(data, _KNOWN)
    refuse_unless(data, _ONLY)
    own_session(data, rules.session_id)
    params = typed(data, "sampling_params", (dict,), {})
    refuse_unknown(params, _FORM_ONLY | _ONLY_PARAMS.keys() | TOKENS.keys(), "sampling_params.")
    refuse_unless(params, _ONLY_PARAMS)
    turn = TurnRequest(
        request_id=evidence.request_id,
        messages=[],
        digests=[],
        tools=b"",
        tool_list=None,
        sampling=settle(read(params, TOKENS), rules.sampling, force=rules.force, max_output_tokens=rules.max_output_tokens),
        retry=evidence.retry,
        idempotency_key=evidence.idempotency_key,
        input_ids=_ids(data.get("input_ids"), rules.vocab_size),
        resent=evidence.resent,
    )
    return TokensRequest(
        turn=turn,
        stream=typed(data, "stream", (bool,), False),
        return_logprob=typed(data, "return_logprob", (bool,), False),
        no_stop_trim=typed(params, "no_stop_trim", (bool,), False),
        rid=typed(data, "rid", (str,), ""),
    )


def _ids(value: Any, vocab_size: int) -> bytes:
    """The ids as int32; checked without a loop in Python, because there are as many as the context is long."""
    if not isinstance(value, list) or not value:
        raise BadRequest("input_ids must be a list with at least one token id", param="input_ids")
    if set(map(type, cast("list[Any]", value))) != {int}:
        raise BadRequest("input_ids must be one list of integers: one prompt per request", param="input_ids")
    ids = cast("list[int]", value)
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise BadRequest(f"input_ids has {bad}, and the vocabulary has the ids 0 to {vocab_size - 1}", param="input_ids")
    return ids_bytes(ids)


def reply_body(node: Node, request: TokensRequest, renderer: Renderer) -> bytes:
    """A committed turn as `/generate` answers it."""
    meta = turns.meta_info(node, turns.finish(node, renderer))
    if request.rid:
        meta["id"] = request.rid
    if request.return_logprob:
        meta["output_token_logprobs"] = turns.logprob_triples(node)
        meta["output_token_logprobs_length"] = meta["completion_tokens"]
    return orjson.dumps({"text": _text(node, request, renderer), "output_ids": ids_of(node.turn.output_ids), "meta_info": meta})


def _text(node: Node, request: TokensRequest, renderer: Renderer) -> str:
    text, stopped = turns.text(node, renderer), turns.matched(node, renderer)
    return text[: text.index(stopped)] if isinstance(stopped, str) and not request.no_stop_trim else text
