"""OpenAI's chat completions: a body to a request, a turn to a reply.

Owns the dialect in both directions, errors included. Pure. Only what is listed here is accepted; what cannot be
honoured is refused with its name. The same turn always gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.body import MAX_DEPTH, load_json
from rollout_ft.session.canonical import running_digests
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node, ids_of
from rollout_ft.types import JSON

_SAMPLING = {
    "temperature": (int, float), "top_p": (int, float), "top_k": (int,), "min_p": (int, float),
    "frequency_penalty": (int, float), "presence_penalty": (int, float), "repetition_penalty": (int, float),
}  # fmt: skip
_LIMITS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
_RANGES = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "top_k": (-1, 2**31), "repetition_penalty": (0, 2)}
_FORCIBLE = _SAMPLING.keys() | {*_LIMITS, "stop", "seed", "ignore_eos", "min_tokens"}
_IGNORED = frozenset({"model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"})
_KNOWN = _IGNORED | _SAMPLING.keys() | {
    "messages", "tools", "tool_choice", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop",
    "seed", "n", "logprobs", "top_logprobs", "response_format", "ignore_eos", "min_tokens",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request and what only its reply's form depends on."""

    turn: TurnRequest
    stream: bool
    include_usage: bool
    logprobs: bool
    model: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the headers say about who asks."""

    request_id: str
    retry: bool = False
    idempotency_key: str = ""
    resent: bool = False


def parse_chat(
    body: bytes, evidence: Evidence, forced: JSON, *, max_messages: int, max_output_tokens: int, max_tools: int = 512,
    max_depth: int = MAX_DEPTH,
) -> ChatRequest:  # fmt: skip
    """`forced` sampling parameters win over the body's. Raises BadRequest naming the field and the remedy."""
    data = load_json(body, max_depth)
    unknown = sorted(data.keys() - _KNOWN)
    if unknown:
        raise BadRequest(f"unknown field {unknown[0]!r}: leave it out", code="unknown_field", param=unknown[0])
    _refuse_unsupported(data)
    messages = _messages(data.get("messages"), max_messages)
    tools = _tools(data.get("tools"), max_tools) if data.get("tool_choice") != "none" else None
    try:
        tool_bytes = orjson.dumps(tools, option=orjson.OPT_SORT_KEYS) if tools else b""
    except TypeError:
        raise BadRequest("tools are nested too deep", param="tools") from None
    turn = TurnRequest(
        request_id=evidence.request_id,
        messages=messages,
        digests=running_digests(tool_bytes, messages),
        tools=tool_bytes,
        tool_list=tools,
        sampling=_sampling(_forced(data, forced), max_output_tokens),
        retry=evidence.retry,
        idempotency_key=evidence.idempotency_key,
        resent=evidence.resent,
    )
    options: Any = _typed(data, "stream_options", (dict,), {})
    return ChatRequest(
        turn=turn,
        stream=_typed(data, "stream", (bool,), False),
        include_usage=bool(options.get("include_usage")),
        logprobs=_typed(data, "logprobs", (bool,), False),
        model=str(data.get("model") or "default"),
    )


def _refuse_unsupported(data: JSON) -> None:
    if data.get("n") not in (None, 1):
        raise BadRequest("n must be 1: ask again for another sample", code="unsupported", param="n")
    if data.get("top_logprobs"):
        raise BadRequest("top_logprobs is not supported: use logprobs", code="unsupported", param="top_logprobs")
    if data.get("tool_choice") not in (None, "auto", "none"):
        raise BadRequest("tool_choice must be auto or none", code="unsupported", param="tool_choice")
    form: Any = data.get("response_format")
    if form is not None and form != {"type": "text"}:
        raise BadRequest("response_format must be text", code="unsupported", param="response_format")


def _messages(value: Any, limit: int) -> list[JSON]:
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    messages = cast("list[Any]", value)
    if len(messages) > limit:
        raise BadRequest(f"more than {limit} messages (session.max_messages)", param="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRequest(f"messages[{i}] must be an object", param=f"messages[{i}]")
    return messages


def _tools(value: Any, limit: int) -> list[Any] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRequest("tools must be a list", param="tools")
    if len(cast("list[Any]", value)) > limit:
        raise BadRequest(f"more than {limit} tools (session.max_tools)", param="tools")
    for i, tool in enumerate(cast("list[Any]", value)):
        function: Any = cast(JSON, tool).get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(cast(JSON, function).get("name"), str):
            raise BadRequest(f"tools[{i}] must be a function with a name", param=f"tools[{i}]")
    return cast("list[Any]", value)


def check_sampling(forced: JSON, max_output_tokens: int) -> None:
    """Whether these can be a session's sampling parameters. Raises BadRequest naming the one that cannot."""
    unknown = sorted(forced.keys() - _FORCIBLE)
    if unknown:
        raise BadRequest(f"sampling has no parameter {unknown[0]!r}; known: {', '.join(sorted(_FORCIBLE))}", param="sampling")
    _sampling(forced, max_output_tokens)


def _forced(data: JSON, forced: JSON) -> JSON:
    """The body with the session's parameters in place of its own."""
    dropped = _LIMITS if forced.keys() & set(_LIMITS) else ()
    return {**{k: v for k, v in data.items() if k not in dropped}, **forced}


def _sampling(data: JSON, max_output_tokens: int) -> JSON:
    sampling: JSON = {}
    for key, kinds in _SAMPLING.items():
        value = _typed(data, key, kinds, None)
        if value is None:
            continue
        low, high = _RANGES.get(key, (-2, 2))
        if not low <= value <= high or (key in ("top_p", "top_k") and value == 0):
            raise BadRequest(f"{key} must be between {low} and {high}, and top_p and top_k not 0", param=key)
        sampling[key] = value
    limits = [_typed(data, key, (int,), None) for key in _LIMITS]
    for key, limit in zip(_LIMITS, limits, strict=True):
        if limit is not None and limit < 1:
            raise BadRequest(f"{key} must be at least 1", param=key)
    sampling["max_new_tokens"] = min([max_output_tokens, *(limit for limit in limits if limit is not None)])
    stop: Any = data.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in cast("list[Any]", stop)):
        raise BadRequest("stop must be a string or a list of strings", param="stop")
    if stop:
        sampling["stop"] = stop
    seed = _typed(data, "seed", (int,), None)
    if seed is not None:
        sampling["sampling_seed"] = seed  # a part of what the turn is; the engine's seed is derived from that
    if _typed(data, "ignore_eos", (bool,), False):
        sampling["ignore_eos"] = True
    least = _typed(data, "min_tokens", (int,), 0)
    if not 0 <= least <= sampling["max_new_tokens"]:
        raise BadRequest("min_tokens must be between 0 and the most tokens allowed", param="min_tokens")
    if least:
        sampling["min_new_tokens"] = least
    return sampling


def _typed(data: JSON, key: str, kinds: tuple[type, ...], default: Any) -> Any:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise BadRequest(f"{key} must be {' or '.join(k.__name__ for k in kinds)}", param=key)
    return value


def _finish(message: JSON, finish_reason: str) -> str:
    return "tool_calls" if message.get("tool_calls") else finish_reason


def _usage(node: Node) -> JSON:
    completion = len(node.turn.output_ids) // 4
    return {"prompt_tokens": node.tokens - completion, "completion_tokens": completion, "total_tokens": node.tokens}


def _logprobs(node: Node, renderer: Renderer) -> JSON:
    values = np.frombuffer(node.turn.logprobs, dtype="<f4").tolist()
    content: list[JSON] = []
    for token, logprob in zip(ids_of(node.turn.output_ids), values, strict=True):
        text = renderer.text([token])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content}


def reply_body(node: Node, request: ChatRequest, renderer: Renderer) -> bytes:
    """The `chat.completion` of a committed turn."""
    message: JSON = orjson.loads(node.turn.reply)
    choice: JSON = {
        "index": 0,
        "message": message,
        "finish_reason": _finish(message, node.turn.finish_reason),
        "logprobs": _logprobs(node, renderer) if request.logprobs else None,
    }
    return orjson.dumps({**_envelope(node, request, "chat.completion"), "choices": [choice], "usage": _usage(node)})


def reply_events(node: Node, request: ChatRequest, renderer: Renderer) -> bytes:
    """The same reply as server-sent events: role, content, tool calls, finish, usage where asked for, `[DONE]`."""
    message: JSON = orjson.loads(node.turn.reply)
    head = _envelope(node, request, "chat.completion.chunk")
    deltas: list[JSON] = [{"role": "assistant", "content": message.get("content") or ""}]
    calls: list[JSON] = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls") or ())]
    if calls:
        deltas.append({"tool_calls": calls})
    logprobs = _logprobs(node, renderer) if request.logprobs else None
    choices: list[JSON] = [{"index": 0, "delta": d, "finish_reason": None, "logprobs": None} for d in deltas]
    choices[0]["logprobs"] = logprobs
    choices.append({"index": 0, "delta": {}, "finish_reason": _finish(message, node.turn.finish_reason), "logprobs": None})
    events = [{**head, "choices": [c]} for c in choices]
    if request.include_usage:
        events.append({**head, "choices": [], "usage": _usage(node)})
    return b"".join(b"data: " + orjson.dumps(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n"


def _envelope(node: Node, request: ChatRequest, kind: str) -> JSON:
    return {"id": f"chatcmpl-{node.turn.key}", "object": kind, "created": node.turn.created, "model": request.model}


def error_body(message: str, code: str, status: int, param: str | None = None) -> bytes:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}})
