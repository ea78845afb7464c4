"""Anthropic's messages: a turn to a reply.

Owns the form of bodies, events and errors. Pure. The same turn always gives the same bytes, and what a client sends back
of them is the same message again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import orjson

from rollout_ft.gateway.dialects import turns
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node
from rollout_ft.types import JSON

RAW_ARGUMENTS = "_arguments"
"""The one key of a tool call's `input` when what the model wrote is no JSON object: its text."""
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_STOPS = {"stop": "end_turn", "length": "max_tokens"}


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A request and what only its reply's form depends on."""

    turn: TurnRequest
    stream: bool = False
    model: str = "default"

    def reply(self, node: Node, renderer: Renderer) -> bytes:
        return reply_events(node, self, renderer) if self.stream else reply_body(node, self, renderer)


def reply_body(node: Node, request: MessagesRequest, renderer: Renderer) -> bytes:
    """The `message` of a committed turn."""
    return orjson.dumps({**_envelope(node, request), "content": _blocks(node), **_stop(node, renderer), "usage": _usage(node)})


def reply_events(node: Node, request: MessagesRequest, renderer: Renderer) -> bytes:
    """The same reply as server-sent events, in the order that Anthropic promises."""
    return b"".join(b"event: " + e["type"].encode() + b"\ndata: " + orjson.dumps(e) + b"\n\n" for e in _events(node, request, renderer))


def _events(node: Node, request: MessagesRequest, renderer: Renderer) -> Iterator[JSON]:
    usage = _usage(node)
    begun: JSON = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": {**usage, "output_tokens": 0}}
    yield {"type": "message_start", "message": {**_envelope(node, request), **begun}}
    for i, block in enumerate(_blocks(node)):
        empty, deltas = _deltas(block)
        yield {"type": "content_block_start", "index": i, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": i, "delta": delta}
        yield {"type": "content_block_stop", "index": i}
    yield {"type": "message_delta", "delta": _stop(node, renderer), "usage": usage}
    yield {"type": "message_stop"}


def _deltas(block: JSON) -> tuple[JSON, list[JSON]]:
    """A block as it begins, and what is added to it."""
    match block["type"]:
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
        case "thinking":
            deltas = [{"type": f"{key}_delta", key: block[key]} for key in ("thinking", "signature")]
            return {**block, "thinking": "", "signature": ""}, deltas
        case _:
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": orjson.dumps(block["input"]).decode()}]


def _blocks(node: Node) -> list[JSON]:
    """Thinking, text, tool calls; there is always one, because clients look for it."""
    message = turns.message(node)
    blocks: list[JSON] = []
    if message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": node.turn.key})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or ():
        function = call["function"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": _input(function.get("arguments"))})
    return blocks or [{"type": "text", "text": ""}]


def _input(arguments: Any) -> JSON:
    if not arguments:
        return {}
    try:
        value: Any = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        value = None
    return cast(JSON, value) if isinstance(value, dict) else {RAW_ARGUMENTS: arguments}


def _envelope(node: Node, request: MessagesRequest) -> JSON:
    return {"id": f"msg_{node.turn.key}", "type": "message", "role": "assistant", "model": request.model}


def _stop(node: Node, renderer: Renderer) -> JSON:
    stopped = turns.matched(node, renderer)
    if isinstance(stopped, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
    if turns.message(node).get("tool_calls") and node.turn.finish_reason == "stop":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": _STOPS.get(node.turn.finish_reason, "end_turn"), "stop_sequence": None}


def _usage(node: Node) -> JSON:
    prompt, completion = turns.usage(node)
    return {"input_tokens": prompt, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": completion}


def error_body(message: str, code: str, status: int, param: str | None = None) -> bytes:
    """Anthropic's error object. A prompt that is too long is said in the words that its clients look for."""
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    if code == "context_length_exceeded":
        message = f"prompt is too long: {message}"
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
