"""Sampling parameters: what an agent says, what its session says, and what the engine is asked for.

Owns their names, their ranges and who wins. Pure. Each dialect has names of its own; here they become the engine's, so
that the same parameters are the same turn in every dialect. What is not listed never reaches an engine.
"""

from __future__ import annotations

from typing import Any, cast

from rollout_ft.errors import BadRequest
from rollout_ft.session.request import TEMPLATE_KWARGS
from rollout_ft.types import JSON

_NUMBERS: dict[str, tuple[tuple[type, ...], float, float]] = {
    "temperature": ((int, float), 0, 100), "top_p": ((int, float), 0, 1), "top_k": ((int,), -1, 2**31),
    "min_p": ((int, float), 0, 1), "frequency_penalty": ((int, float), -2, 2), "presence_penalty": ((int, float), -2, 2),
    "repetition_penalty": ((int, float), 0, 2), "max_new_tokens": ((int,), 1, 2**63), "min_new_tokens": ((int,), 0, 2**63),
    "sampling_seed": ((int,), -(2**63), 2**64),
}  # fmt: skip
_SAME = {name: name for name in _NUMBERS if name not in ("max_new_tokens", "min_new_tokens", "sampling_seed")}
CHAT = _SAME | {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "stop": "stop", "seed": "sampling_seed",
    "ignore_eos": "ignore_eos", "min_tokens": "min_new_tokens", "stop_token_ids": "stop_token_ids",
}  # fmt: skip
MESSAGES = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_new_tokens", "stop_sequences": "stop",
}  # fmt: skip
TOKENS = {name: name for name in (*_NUMBERS, "stop", "stop_token_ids", "ignore_eos")}
SESSION = TOKENS | CHAT


def read(data: JSON, names: dict[str, str]) -> JSON:
    """The parameters that a body says, by the engine's names; refusals use the body's. What changes nothing is left out."""
    said: JSON = {}
    for key, name in names.items():
        value = data.get(key)
        if value is None:
            continue
        value = _checked(key, name, value)
        if name == "max_new_tokens":
            value = min(value, said.get(name, value))
        if value or name not in ("stop", "stop_token_ids", "ignore_eos", "min_new_tokens"):
            said[name] = value
    return said


def session_sampling(*given: JSON) -> JSON:
    """The session's own parameters, by the engine's names: the config's, then what the session was opened with.

    Raises BadRequest naming the one that cannot be.
    """
    merged: JSON = {}
    for parameters in given:
        unknown = sorted(parameters.keys() - SESSION.keys())
        if unknown:
            raise BadRequest(f"sampling has no parameter {unknown[0]!r}; known: {', '.join(sorted(SESSION))}", param="sampling")
        merged |= read(parameters, SESSION)
    return merged


def check_sampling(given: JSON, max_output_tokens: int) -> None:
    """Whether these can be a session's sampling parameters. Raises BadRequest naming the one that cannot."""
    settle({}, session_sampling(given), force=True, max_output_tokens=max_output_tokens)


def settle(said: JSON, own: JSON, *, force: bool, max_output_tokens: int) -> JSON:
    """What the engine is asked for: `force` lets the session's own parameters win over what was said."""
    used = {**said, **own} if force else {**own, **said}
    used["max_new_tokens"] = min(max_output_tokens, used.get("max_new_tokens", max_output_tokens))
    if used.get("min_new_tokens", 0) > used["max_new_tokens"]:
        raise BadRequest("min_tokens must be at most the number of tokens allowed", param="min_tokens")
    return used


def with_template(sampling: JSON, kwargs: JSON) -> JSON:
    """The same with the chat template's arguments: other arguments are another turn of the same conversation."""
    return {**sampling, TEMPLATE_KWARGS: kwargs} if kwargs else sampling


def _checked(key: str, name: str, value: Any) -> Any:
    if name == "stop":
        return _stop(key, value)
    if name == "stop_token_ids":
        return _ids(key, value)
    if name == "ignore_eos":
        if not isinstance(value, bool):
            raise BadRequest(f"{key} must be true or false", param=key)
        return value
    kinds, low, high = _NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise BadRequest(f"{key} must be {' or '.join(k.__name__ for k in kinds)}", param=key)
    if not low <= value <= high or (name in ("top_p", "top_k") and value == 0):
        raise BadRequest(f"{key} must be between {low} and {high}, and top_p and top_k not 0", param=key)
    return value


def _stop(key: str, value: Any) -> list[str]:
    stop: Any = [value] if isinstance(value, str) and value else value
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in cast("list[Any]", stop)):
        raise BadRequest(f"{key} must be a string or a list of strings", param=key)
    return cast("list[str]", stop)


def _ids(key: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in cast("list[Any]", value)):
        raise BadRequest(f"{key} must be a list of token ids", param=key)
    return cast("list[int]", value)
