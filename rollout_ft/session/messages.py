"""A conversation in the shape that chat templates expect.

Owns the difference between what clients send and what templates are written for. Knows nothing of a certain template
but how it takes the arguments of tool calls. Pure; arguments that are no JSON are never an error: a model wrote them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import orjson

from rollout_ft.session.canonical import text_of
from rollout_ft.types import JSON


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template takes calls: their arguments as an object or as its JSON text, and whether any other text will do;
    and whether a message with calls and without content must say null."""

    as_object: bool = True
    any_text: bool = True
    null_content: bool = False


def for_template(message: JSON, form: CallForm, where: str = "message") -> JSON:
    """Content as text and no key without a value: templates ask whether `tool_calls` is there, not whether it is null.

    Raises BadRequest for content that is not text.
    """
    plain: JSON = {k: v for k, v in message.items() if v is not None}
    plain["content"] = text_of(message.get("content"), where)
    calls: Any = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = [_call(call, form) for call in calls]
        plain["content"] = plain["content"] or (None if form.null_content else "")
    return plain


def tools_for_template(tools: list[Any] | None) -> list[Any] | None:
    """No tools are None: templates ask whether there are tools in either way."""
    return tools or None


def _call(call: JSON, form: CallForm) -> JSON:
    function = cast(JSON, call["function"])
    return {"type": "function", **call, "function": {**function, "arguments": _arguments(function.get("arguments"), form)}}


def _arguments(value: Any, form: CallForm) -> Any:
    if not form.as_object:
        return value if isinstance(value, str) else json.dumps(value or {}, ensure_ascii=False)
    parsed = _object(value)
    if parsed is not None:
        return parsed
    return value if form.any_text else {"arguments": value}


def _object(value: Any) -> JSON | None:
    """The object that the arguments are; None when they are something else."""
    if not value or isinstance(value, dict):
        return cast(JSON, value or {})
    try:
        orjson.loads(value)  # strict: what json alone accepts (NaN, half a surrogate pair) stays text
        parsed: Any = json.loads(value)  # exact: orjson makes floats of long integers
    except (ValueError, TypeError, RecursionError):
        return None
    return cast(JSON, parsed) if isinstance(parsed, dict) else None
