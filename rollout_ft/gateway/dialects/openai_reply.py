"""OpenAI's chat completions: a turn to a reply.

Owns the form of bodies, events and errors. Pure. The same turn always gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from rollout_ft.gateway.dialects import turns
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node, ids_of
from rollout_ft.types import JSON


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request and what only its reply's form depends on."""

    turn: TurnRequest
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    return_meta_info: bool = False
    """With the logprobs of all sampled tokens, as miles' session server has them."""
    model: str = "default"

    def reply(self, node: Node, renderer: Renderer) -> bytes:
        return reply_events(node, self, renderer) if self.stream else reply_body(node, self, renderer)


def reply_body(node: Node, request: ChatRequest, renderer: Renderer) -> bytes:
    """The `chat.completion` of a committed turn."""
    message = turns.message(node)
    choice: JSON = {
        "index": 0,
        "message": message,
        "finish_reason": turns.finish_reason(node, message),
        "logprobs": _logprobs(node, renderer) if request.logprobs else None,
    }
    if request.return_token_ids:
        choice |= {"prompt_token_ids": turns.prompt_ids(node), "response_token_ids": ids_of(node.turn.output_ids)}
    if request.return_meta_info:
        choice["meta_info"] = _meta_info(node, renderer)
    return orjson.dumps({**_envelope(node, request, "chat.completion"), "choices": [choice], "usage": _usage(node)})


def reply_events(node: Node, request: ChatRequest, renderer: Renderer) -> bytes:
    """The same reply as server-sent events: role, reasoning, content, tool calls, finish, usage where asked for, `[DONE]`."""
    message = turns.message(node)
    head = _envelope(node, request, "chat.completion.chunk")
    deltas: list[JSON] = [{"role": "assistant", "content": ""}]
    deltas += [{key: message[key]} for key in ("reasoning_content", "content") if message.get(key)]
    deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(message.get("tool_calls") or ())]
    choices: list[JSON] = [{"index": 0, "delta": d, "finish_reason": None, "logprobs": None} for d in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": turns.finish_reason(node, message), "logprobs": None})
    choices[1]["logprobs"] = _logprobs(node, renderer) if request.logprobs else None
    if request.return_meta_info:
        choices[-1]["meta_info"] = _meta_info(node, renderer)
    events: list[JSON] = [{**head, "choices": [c]} for c in choices]
    if request.include_usage:
        events = [{**event, "usage": None} for event in events]
        events.append({**head, "choices": [], "usage": _usage(node)})
    return b"".join(b"data: " + orjson.dumps(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n"


def _envelope(node: Node, request: ChatRequest, kind: str) -> JSON:
    return {"id": f"chatcmpl-{node.turn.key}", "object": kind, "created": int(node.turn.created), "model": request.model}


def _usage(node: Node) -> JSON:
    prompt, completion = turns.usage(node)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _meta_info(node: Node, renderer: Renderer) -> JSON:
    return {**turns.meta_info(node, turns.finish(node, renderer)), "output_token_logprobs": turns.logprob_triples(node)}


def _logprobs(node: Node, renderer: Renderer) -> JSON:
    content: list[JSON] = []
    for token, logprob in turns.token_logprobs(node):
        text = renderer.text([token])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content}


def error_body(message: str, code: str, status: int, param: str | None = None) -> bytes:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}})


def models_body(model: str, context_tokens: int) -> bytes:
    """The one model that there is."""
    entry: JSON = {"id": model, "object": "model", "created": 0, "owned_by": "rollout_ft", "root": model, "max_model_len": context_tokens}
    return orjson.dumps({"object": "list", "data": [entry]})
