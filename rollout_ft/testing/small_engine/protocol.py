"""SGLang's `/generate`, as data: what a request may say, and what a reply looks like.

Owns the checks of a body, with SGLang's answers to what is wrong, and the JSON of replies and chunks. Must not know of
sockets or of the order in which things run. The subtle invariant: the schema and the values are refused apart, as
SGLang does it. A wrong schema is a 400 whatever was asked for; a wrong value is a 400 too, but inside the stream of a
streaming request, under HTTP status 200.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rollout_ft.testing.small_engine.model import Ids, Sampling
from rollout_ft.testing.small_engine.vocabulary import Vocabulary

JSON = dict[str, Any]

_UNSUPPORTED = frozenset({"stop_regex", "json_schema", "regex", "ebnf", "structural_tag", "logit_bias"})
_PENALTIES = {"frequency_penalty": (-2.0, 2.0), "presence_penalty": (-2.0, 2.0), "repetition_penalty": (0.0, 2.0)}
_WITHOUT_EFFECT = _PENALTIES.keys() | {"spaces_between_special_tokens"}
_SAMPLING_KEYS = _UNSUPPORTED | _WITHOUT_EFFECT | {
    "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "n",
    "ignore_eos", "skip_special_tokens", "no_stop_trim", "stream_interval", "sampling_seed", "custom_params",
}  # fmt: skip


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "top_k", "n", "sampling_seed", "stream_interval"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "min_p", *_PENALTIES), (int, float)),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "no_stop_trim", "spaces_between_special_tokens"), (bool,)),
}


class SchemaError(Exception):
    """The body is not a request: the frame around SGLang says so."""


class ContractError(Exception):
    """The body is no request of SGLang's own schema: a field of the wrong type, an unknown sampling parameter."""


class ValueRefused(Exception):
    """The body is a request that cannot be served as it is; `status` as SGLang gives it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class DuplicateRid(ValueRefused):
    """There is a request of this name already."""


class Died(Exception):
    """What ends SGLang's scheduler, and its server with it. This engine ends as well."""


class OutOfVocabulary(Died):
    """A token id that no row of the embedding has: an IndexError there."""


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
    logprob_start: int
    """Where the logprobs of the prompt begin; -1: none are wanted."""
    skip_special_tokens: bool
    no_stop_trim: bool
    slowdown: Slowdown | None
    routed_from: int | None
    """The first row of routed experts that is wanted, if any is."""


def wants_stream(body: JSON) -> bool:
    return body.get("stream") is True


def check_schema(body: Any) -> JSON:
    """The body and its sampling parameters are objects, with known sampling keys of the right types."""
    if not isinstance(body, dict):
        raise SchemaError("1 validation error: the body is not a JSON object")
    request = cast(JSON, body)
    rid, ids = request.get("rid"), request.get("input_ids")
    if rid is not None and not isinstance(rid, str):
        raise SchemaError("2 validation errors: rid should be a valid string")
    if ids is not None and not isinstance(ids, list):
        raise SchemaError("1 validation error: input_ids must be list or null")
    sampling: Any = request.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        raise ContractError("invalid type: sampling_params is not an object")
    _check_sampling(cast(JSON, sampling))
    return request


def _check_sampling(params: JSON) -> None:
    for name, value in params.items():
        if name not in _SAMPLING_KEYS:
            raise ContractError(f"unknown field `{name}`, expected one of {', '.join(f'`{key}`' for key in sorted(_SAMPLING_KEYS))}")
        types = _TYPES.get(name)
        if value is None or types is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ContractError(f"invalid type: {type(value).__name__} `{value}` for {name}")
        if name == "sampling_seed" and not -(1 << 63) <= value < 1 << 63:
            raise ContractError(f"invalid type: `{value}` for {name}, expected i64")
    stop: Any = params.get("stop") or []
    if not isinstance(stop, str | list) or not all(isinstance(entry, str) for entry in cast(list[Any], stop)):
        raise ContractError("invalid type for stop, expected a string or an array of strings")
    stop_ids: Any = params.get("stop_token_ids") or []
    if not isinstance(stop_ids, list) or not all(isinstance(entry, int) for entry in cast(list[Any], stop_ids)):
        raise ContractError("invalid type for stop_token_ids, expected an array of i64")


def parse_request(body: JSON, vocabulary: Vocabulary, context_length: int) -> Request:
    """A request out of a body of the right schema; raises SchemaError, ValueRefused or OutOfVocabulary."""
    params: JSON = body.get("sampling_params") or {}
    prompt = _prompt(body, vocabulary)
    _check_values(params)
    # Without a limit a request goes on to the end of the context.
    most = params.get("max_new_tokens", 128)
    max_new_tokens = context_length - len(prompt) if most is None else int(most)
    if len(prompt) >= context_length:
        lengths = f"({len(prompt)} tokens) is longer than the model's context length ({context_length} tokens)"
        raise ValueRefused(f"The input {lengths}.")
    if len(prompt) + max_new_tokens > context_length:
        raise ValueRefused(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. "
            f"You requested a total of {len(prompt) + max_new_tokens} tokens: {len(prompt)} tokens from the input "
            f"messages and {max_new_tokens} tokens for the completion."
        )
    if len(prompt) >= context_length - 6:
        allowed = f"the maximum allowed length ({context_length - 6} tokens). Use a shorter input or enable --allow-auto-truncate."
        raise ValueRefused(f"Input length ({len(prompt)} tokens) exceeds {allowed}")
    # The end of the context ends a generation two tokens early, without a word.
    max_new_tokens = min(max_new_tokens, context_length - 2 - len(prompt))
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocabulary.size:
        raise OutOfVocabulary(f"input_ids {prompt.min()} to {prompt.max()} in a vocabulary of {vocabulary.size}")
    ignore_eos = bool(params.get("ignore_eos", False))
    stops = frozenset[int](params.get("stop_token_ids") or ())
    stop: str | list[str] = params.get("stop") or []
    seed = params.get("sampling_seed")
    top_k = int(params.get("top_k") or -1)
    return Request(
        rid=body.get("rid") or secrets.token_hex(16),
        prompt=prompt,
        sampling=Sampling(
            temperature=float(_given(params, "temperature", 1.0)),
            top_p=float(_given(params, "top_p", 1.0)),
            top_k=top_k if top_k > 0 else -1,
            min_p=float(_given(params, "min_p", 0.0)),
            seed=secrets.randbits(63) if seed is None else seed,
            ignore_eos=ignore_eos,
            stops=frozenset() if ignore_eos else stops | {vocabulary.eos_id},
        ),
        max_new_tokens=max_new_tokens,
        min_new_tokens=int(_given(params, "min_new_tokens", 0)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=wants_stream(body),
        stream_interval=max(0, _given(params, "stream_interval", 0)) or None,
        return_logprob=bool(body.get("return_logprob", False)),
        logprob_start=int(_given(body, "logprob_start_len", -1)),
        skip_special_tokens=bool(_given(params, "skip_special_tokens", True)),
        no_stop_trim=bool(_given(params, "no_stop_trim", False)),
        slowdown=_slowdown(params.get("custom_params")),
        routed_from=_routed_from(body, len(prompt)),
    )


def _given(params: JSON, name: str, default: Any) -> Any:
    value = params.get(name)
    return default if value is None else value


def _check_values(params: JSON) -> None:
    """SGLang's own ranges, in its words."""
    temperature, top_p, min_p = (_given(params, name, default) for name, default in (("temperature", 1), ("top_p", 1), ("min_p", 0)))
    most, least = params.get("max_new_tokens", 128), _given(params, "min_new_tokens", 0)
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueRefused(f"temperature must be a non-negative finite number, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueRefused(f"top_p must be in (0, 1], got {top_p}.")
    if not 0 <= min_p <= 1:
        raise ValueRefused(f"min_p must be in [0, 1], got {min_p}.")
    for name, (low, high) in _PENALTIES.items():
        value = params.get(name)
        if value is not None and not (low <= value <= high and (low or value)):
            raise ValueRefused(f"{name} must be in {'[' if low else '('}{low:g}, {high:g}], got {value}.")
    if least < 0:
        raise ValueRefused(f"min_new_tokens must be in [0, max_new_tokens], got {least}.")
    if most is not None and most < 0:
        raise ValueRefused(f"max_new_tokens must be at least 0, got {most}.")
    if most is not None and least > most:
        raise ValueRefused(f"min_new_tokens must be in [0, max_new_tokens({most})], got {least}.")
    for name in _UNSUPPORTED:
        if params.get(name):
            raise ValueRefused(f"{name} is not supported by the small engine")
    if (params.get("n") or 1) != 1:
        raise ValueRefused("n must be 1: the small engine samples one sequence per request")


def _prompt(body: JSON, vocabulary: Vocabulary) -> Ids:
    ids, text = body.get("input_ids"), body.get("text")
    if ids is None and text is None:
        raise ValueRefused("Either text, input_ids or input_embeds should be provided.")
    if ids is None and isinstance(text, str):
        ids = vocabulary.encode(text)
    if not ids:
        raise ValueRefused("input_ids cannot be empty.")
    try:
        array = np.array(ids)
    except ValueError as error:
        raise ValueRefused("input_ids should be one list of token ids: the small engine takes no batches.") from error
    if array.dtype.kind != "i":
        raise SchemaError("1 validation error: input_ids: elements must be int or list")
    if array.ndim != 1:
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
