"""SGLang's `/generate`, as data: what a request may say, and what a reply looks like.

Owns the checks of a body, with SGLang's answers to what is wrong, and the JSON of replies and chunks. Must not know of
sockets or of the order in which things run. The subtle invariant: the schema and the values are refused apart, as
SGLang does it. A wrong schema is a 400 whatever was asked for; a wrong value is a 400 too, but inside the stream of a
streaming request, under HTTP status 200.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rollout_ft.testing.small_engine.model import Ids, Sampling
from rollout_ft.testing.small_engine.vocabulary import Vocabulary

JSON = dict[str, Any]

_UNSUPPORTED = frozenset({"stop_regex", "json_schema", "regex", "ebnf", "structural_tag", "logit_bias"})
_WITHOUT_EFFECT = frozenset({
    "frequency_penalty", "presence_penalty", "repetition_penalty", "spaces_between_special_tokens",
})  # fmt: skip
_SAMPLING_KEYS = _UNSUPPORTED | _WITHOUT_EFFECT | {
    "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "n",
    "ignore_eos", "skip_special_tokens", "no_stop_trim", "stream_interval", "sampling_seed", "custom_params",
}  # fmt: skip


class SchemaError(Exception):
    """The body is not a request."""


class ValueRefused(Exception):
    """The body is a request that cannot be served as it is; `status` as SGLang gives it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class OutOfVocabulary(Exception):
    """A token id that no row of the embedding has. SGLang's scheduler dies of it, and so does this engine."""


@dataclass(frozen=True, slots=True)
class Slowdown:
    """From the request's own output token `from_token` on, `tokens_per_s` is its pace."""

    from_token: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Request:
    """A checked `/generate` body."""

    rid: str
    prompt: Ids
    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    stream: bool
    stream_interval: int | None
    return_logprob: bool
    skip_special_tokens: bool
    no_stop_trim: bool
    slowdown: Slowdown | None
    routed_from: int | None
    """The first row of routed experts that is wanted, if any is."""


def wants_stream(body: JSON) -> bool:
    return body.get("stream") is True


def check_schema(body: Any) -> JSON:
    """The body and its sampling parameters are objects, with known sampling keys."""
    if not isinstance(body, dict):
        raise SchemaError("the body is not a JSON object")
    request = cast(JSON, body)
    sampling: Any = request.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        raise SchemaError("sampling_params is not an object")
    unknown = sorted(cast(JSON, sampling).keys() - _SAMPLING_KEYS)
    if unknown:
        raise SchemaError(f"unexpected keyword in sampling_params: {', '.join(unknown)}")
    rid = request.get("rid")
    if rid is not None and not isinstance(rid, str):
        raise SchemaError("rid is not a string")
    return request


def parse_request(body: JSON, vocabulary: Vocabulary, context_length: int) -> Request:
    """A request out of a body of the right schema; raises ValueRefused or OutOfVocabulary."""
    params: JSON = body.get("sampling_params") or {}
    prompt = _prompt(body, vocabulary)
    max_new_tokens = _number(params, "max_new_tokens", 128, 0)
    if len(prompt) >= context_length:
        lengths = f"({len(prompt)} tokens) is longer than the model's context length ({context_length} tokens)"
        raise ValueRefused(f"The input {lengths}.")
    if len(prompt) + max_new_tokens > context_length:
        raise ValueRefused(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. "
            f"You requested a total of {len(prompt) + max_new_tokens} tokens: {len(prompt)} tokens from the input "
            f"messages and {max_new_tokens} tokens for the completion."
        )
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocabulary.size:
        raise OutOfVocabulary(f"input_ids {prompt.min()} to {prompt.max()} in a vocabulary of {vocabulary.size}")
    for name in _UNSUPPORTED:
        if params.get(name):
            raise ValueRefused(f"{name} is not supported by the small engine")
    if _number(params, "n", 1, 1) != 1:
        raise ValueRefused("n must be 1: the small engine samples one sequence per request")
    temperature = _real(params, "temperature", 1.0, 0.0)
    top_p, min_p = _real(params, "top_p", 1.0, 0.0), _real(params, "min_p", 0.0, 0.0)
    top_k = _number(params, "top_k", -1, -1)
    if not 0 < top_p <= 1 or min_p > 1 or top_k == 0:
        raise ValueRefused("top_p must be in (0, 1], min_p in [0, 1], and top_k -1 (disable) or at least 1")
    ignore_eos = bool(params.get("ignore_eos", False))
    stop: Any = params.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    stop_ids: Any = params.get("stop_token_ids") or []
    if not all(isinstance(entry, str) for entry in stop) or not all(isinstance(entry, int) for entry in stop_ids):
        raise ValueRefused("stop should be strings and stop_token_ids token ids.")
    stops = frozenset(stop_ids)
    seed = _number(params, "sampling_seed", secrets.randbits(63), -(1 << 63))
    interval = _number(params, "stream_interval", 0, 1)
    return Request(
        rid=body.get("rid") or secrets.token_hex(16),
        prompt=prompt,
        sampling=Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            ignore_eos=ignore_eos,
            stops=stops if ignore_eos else stops | {vocabulary.eos_id},
        ),
        max_new_tokens=max_new_tokens,
        min_new_tokens=_number(params, "min_new_tokens", 0, 0),
        stop=tuple(stop),
        stream=wants_stream(body),
        stream_interval=interval or None,
        return_logprob=bool(body.get("return_logprob", False)),
        skip_special_tokens=bool(params.get("skip_special_tokens", True)),
        no_stop_trim=bool(params.get("no_stop_trim", False)),
        slowdown=_slowdown(params.get("custom_params")),
        routed_from=_routed_from(body, len(prompt)),
    )


def _prompt(body: JSON, vocabulary: Vocabulary) -> Ids:
    ids, text = body.get("input_ids"), body.get("text")
    if (ids is None) == (text is None):
        raise ValueRefused("Either text or input_ids should be provided.")
    if isinstance(text, str):
        ids = vocabulary.encode(text)
    if not isinstance(ids, list) or not ids:
        raise ValueRefused("input_ids should be a list of token ids that is not empty.")
    try:
        array = np.array(ids)
    except ValueError as error:
        raise ValueRefused("input_ids should be one list of token ids: the small engine takes no batches.") from error
    if array.ndim != 1 or array.dtype.kind != "i":
        raise ValueRefused("input_ids should be one list of token ids: the small engine takes no batches.")
    # Ids beyond int32 are as far outside the vocabulary as the largest int32.
    return array.clip(-(1 << 31), (1 << 31) - 1).astype(np.int32)


def _slowdown(custom: Any) -> Slowdown | None:
    if not isinstance(custom, dict) or "tokens_per_s" not in custom:
        return None
    params = cast(JSON, custom)
    rate = _real(params, "tokens_per_s", 1.0, 0.0)
    if rate == 0:
        raise ValueRefused("custom_params.tokens_per_s must be positive")
    return Slowdown(from_token=_number(params, "from_token", 0, 0), tokens_per_s=rate)


def _routed_from(body: JSON, prompt_tokens: int) -> int | None:
    if not body.get("return_routed_experts"):
        return None
    start = _number(body, "routed_experts_start_len", 0, 0)
    if start > prompt_tokens:
        raise ValueRefused(f"recv_req.routed_experts_start_len={start} is higher than the number of input tokens {prompt_tokens}.")
    return start


def _number(params: JSON, name: str, default: int, least: int) -> int:
    value = params.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueRefused(f"{name} must be an integer of at least {least}, got {value!r}.")
    return value


def _real(params: JSON, name: str, default: float, least: float) -> float:
    value = params.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
        raise ValueRefused(f"{name} must be a number of at least {least}, got {value!r}.")
    return float(value)
