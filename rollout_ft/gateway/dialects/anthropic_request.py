"""Anthropic's messages: a body to a request.

Owns what a body may say, and how its blocks become OpenAI's messages, so that a session may be used through both. Pure.
What is not text, thinking, a tool call or a tool's result is refused with its place. Marks for Anthropic's own cache
and the signatures of thinking mean nothing here.
"""

from __future__ import annotations

from typing import Any, cast

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.dialects.anthropic_reply import RAW_ARGUMENTS, MessagesRequest
from rollout_ft.gateway.dialects.base import Evidence, Rules
from rollout_ft.gateway.dialects.conversation import Conversation, ToolChoice, turn_request
from rollout_ft.gateway.dialects.fields import dumped, objects, own_session, refuse_unknown, typed
from rollout_ft.gateway.dialects.sampling import MESSAGES, read
from rollout_ft.types import JSON, Raw

_KNOWN = frozenset({
    "model", "messages", "system", "tools", "tool_choice", "thinking", "stream", "session_id", "metadata", "service_tier", *MESSAGES,
})  # fmt: skip
_TOOL = frozenset({"name", "description", "input_schema", "type", "cache_control"})
_CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "named"}


def parse_messages(body: Raw, evidence: Evidence, rules: Rules, *, counting: bool = False) -> MessagesRequest:
    """Raises BadRequest naming the field and the remedy; only a request to count may leave out `max_tokens`."""
    data = rules.load(body)
    refuse_unknown(data, _KNOWN)
    own_session(data, rules.session_id)
    if data.get("max_tokens") is None and not counting:
        raise BadRequest("max_tokens: Field required", param="max_tokens")
    choice, parallel = _choice(typed(data, "tool_choice", (dict,), {"type": "auto"}))
    conversation = Conversation(
        messages=[*_system(data.get("system")), *_messages(data)],
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(objects(data, "tools"))],
        choice=choice,
        parallel=parallel,
        said=read(data, MESSAGES),
        template_kwargs=_thinking(typed(data, "thinking", (dict,), {})),
    )
    return MessagesRequest(
        turn=turn_request(conversation, evidence, rules),
        stream=typed(data, "stream", (bool,), False),
        model=typed(data, "model", (str,), rules.model) or rules.model,
    )


def _system(value: Any) -> list[JSON]:
    text = "" if value is None else _text(value, "system")
    return [{"role": "system", "content": text}] if text else []


def _messages(data: JSON) -> list[JSON]:
    given = objects(data, "messages")
    if not given:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    made: list[JSON] = []
    for i, message in enumerate(given):
        role, where = message.get("role"), f"messages[{i}]"
        if role == "user":
            made += _user(message.get("content"), where)
        elif role == "assistant":
            made.append(_assistant(message.get("content"), where))
        else:
            raise BadRequest(f"{where}.role is {role!r}: use user or assistant", param=where)
    if given[-1]["role"] == "assistant":
        message = "the last message is the assistant's: a reply cannot be begun for the model; end with a user's message"
        raise BadRequest(message, code="unsupported", param="messages")
    return made


def _user(content: Any, where: str) -> list[JSON]:
    """Results of tools are messages of their own; the text between them is the user's."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    made: list[JSON] = []
    for kind, block, at in _blocks(content, where):
        if kind == "tool_result":
            made.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", at), "content": _result(block, at)})
        elif kind == "text" and made and made[-1]["role"] == "user":
            made[-1]["content"] += _string(block, "text", at)
        elif kind == "text":
            made.append({"role": "user", "content": _string(block, "text", at)})
        else:
            raise _refused(kind, at)
    return made or [{"role": "user", "content": ""}]


def _assistant(content: Any, where: str) -> JSON:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    text, thinking, calls = "", "", list[JSON]()
    for kind, block, at in _blocks(content, where):
        if kind == "text":
            text += _string(block, "text", at)
        elif kind == "thinking":
            thinking += _string(block, "thinking", at)
        elif kind == "tool_use":
            function = {"name": _string(block, "name", at), "arguments": _arguments(block.get("input"), at)}
            calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
        else:
            raise _refused(kind, at)
    made: JSON = {"role": "assistant", "content": text or (None if calls else "")}
    return made | ({"reasoning_content": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})


def _result(block: JSON, where: str) -> str:
    """What a tool said; that it failed is said in words, the only thing that a chat template can show."""
    content = block.get("content")
    text = "" if content is None else _text(content, f"{where}.content")
    return f"Error: {text}" if typed(block, "is_error", (bool,), False) else text


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for kind, block, at in _blocks(content, where, ""):
        if kind != "text":
            raise _refused(kind, at)
        texts.append(_string(block, "text", at))
    return "".join(texts)


def _blocks(content: Any, where: str, inner: str = ".content") -> list[tuple[Any, JSON, str]]:
    """Each block with its type and its place."""
    if not isinstance(content, list):
        raise BadRequest(f"{where}{inner} must be text or a list of blocks", param=where)
    found: list[tuple[Any, JSON, str]] = []
    for i, block in enumerate(cast("list[Any]", content)):
        at = f"{where}{inner}[{i}]"
        if not isinstance(block, dict):
            raise BadRequest(f"{at} must be a block with a type", param=at)
        found.append((cast(JSON, block).get("type"), cast(JSON, block), at))
    return found


def _refused(kind: Any, where: str) -> BadRequest:
    return BadRequest(f"{where} is a {kind!r} block, which cannot be rendered here: leave it out", code="unsupported", param=where)


def _string(block: JSON, key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{key} must be text", param=f"{where}.{key}")
    return value


def _arguments(value: Any, where: str) -> str:
    """As the model wrote them: our own replies wrap what was no JSON object."""
    if not isinstance(value, dict):
        raise BadRequest(f"{where}.input must be an object", param=f"{where}.input")
    fields = cast(JSON, value)
    raw = fields.get(RAW_ARGUMENTS)
    return raw if isinstance(raw, str) and len(fields) == 1 else dumped(fields, f"{where}.input").decode()


def _tool(tool: JSON, where: str) -> JSON:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise BadRequest(f"{where} is a {kind!r} tool, which runs at Anthropic: use tools of your own", code="unsupported", param=where)
    refuse_unknown(tool, _TOOL, where + ".")
    function: JSON = {"name": _string(tool, "name", where)}
    if tool.get("description") is not None:
        function["description"] = _string(tool, "description", where)
    if not isinstance(tool.get("input_schema"), dict):
        raise BadRequest(f"{where}.input_schema must be an object", param=where)
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _choice(value: JSON) -> tuple[ToolChoice, bool]:
    """The choice, and whether several calls at once are allowed."""
    kind = _CHOICES.get(value["type"]) if isinstance(value.get("type"), str) else None
    refuse_unknown(value, ("type", "name", "disable_parallel_tool_use"), "tool_choice.")
    if kind is None:
        raise BadRequest(f"tool_choice.type must be one of {', '.join(_CHOICES)}", param="tool_choice")
    name = _string(value, "name", "tool_choice") if kind == "named" else ""
    return ToolChoice(cast(Any, kind), name), not typed(value, "disable_parallel_tool_use", (bool,), False)


def _thinking(value: JSON) -> JSON:
    """Thinking on or off, where the template knows the difference. A budget of tokens within `max_tokens` is a bound that
    no engine keeps; it is accepted because every client that wants thinking must name one, and `max_tokens` bounds both."""
    match value.get("type"):
        case "enabled":
            budget = typed(value, "budget_tokens", (int,), 1)
            if budget < 1:
                raise BadRequest("thinking.budget_tokens must be at least 1", param="thinking")
            return {"enable_thinking": True}
        case "disabled":
            return {"enable_thinking": False}
        case "adaptive":
            return {}
        case None if not value:
            return {}
        case kind:
            raise BadRequest(f"thinking.type is {kind!r}: use enabled, disabled or adaptive", param="thinking")
