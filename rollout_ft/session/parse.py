"""Sampled token ids to the assistant message that a client gets.

Owns the cutting of stop tokens and stop strings and the reading of tool calls. Pure; never fails on what a model wrote:
a tool call that does not parse is text. The same ids always give the same message, ids of tool calls included.
"""

from __future__ import annotations

import re
from typing import Any, cast

import orjson

from rollout_ft.session.render import Renderer
from rollout_ft.types import JSON

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def assistant_message(output_ids: list[int], renderer: Renderer, *, stop: list[str], turn_key: str, tools: bool) -> tuple[JSON, str]:
    """`(message, finish)`; `finish` is `tool_calls` when there are any, else empty. UTF-8 is decoded over all ids."""
    ids = output_ids[:-1] if output_ids and output_ids[-1] in renderer.stop_ids else output_ids
    text = renderer.text(ids)
    cuts = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    if cuts:
        text = text[: min(cuts)]
    if not tools:
        return {"role": "assistant", "content": text}, ""
    calls, rest = _tool_calls(text, turn_key)
    if not calls:
        return {"role": "assistant", "content": text}, ""
    return {"role": "assistant", "content": rest or None, "tool_calls": calls}, "tool_calls"


def _tool_calls(text: str, turn_key: str) -> tuple[list[JSON], str]:
    calls: list[JSON] = []
    kept: list[str] = []
    end = 0
    for match in _TOOL_CALL.finditer(text):
        call = _call(match.group(1), f"call_{turn_key[:16]}_{len(calls)}")
        if call is not None:
            calls.append(call)
            kept.append(text[end : match.start()])
            end = match.end()
    kept.append(text[end:])
    return calls, "".join(kept).strip()


def _call(source: str, call_id: str) -> JSON | None:
    try:
        value: Any = orjson.loads(source)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict):
        return None
    fields = cast(JSON, value)
    name, args = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str):
        return None
    try:
        text = args if isinstance(args, str) else orjson.dumps(args).decode()
    except TypeError:  # nested deeper than can be written again: it stays text
        return None
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}
