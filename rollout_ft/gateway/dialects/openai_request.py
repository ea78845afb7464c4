"""OpenAI's chat completions: a body to a request.

Owns what a body may say. Pure. Only what is listed here is accepted: what cannot be honoured is refused with its name,
what is listed as ignored changes nothing about the reply's content. Fields of an engine never reach one.
"""

from __future__ import annotations

from typing import Any, cast

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.dialects.base import Evidence, Rules
from rollout_ft.gateway.dialects.conversation import Conversation, ToolChoice, turn_request
from rollout_ft.gateway.dialects.fields import objects, own_session, refuse_unknown, refuse_unless, typed
from rollout_ft.gateway.dialects.openai_reply import ChatRequest
from rollout_ft.gateway.dialects.sampling import CHAT, read
from rollout_ft.types import JSON, Raw

_IGNORED = frozenset({
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,), "top_logprobs": (0,), "logit_bias": ({},), "modalities": (["text"],), "separate_reasoning": (True,),
    "stream_reasoning": (True,), "skip_special_tokens": (True,), "no_stop_trim": (False,), "continue_final_message": (False,),
}  # fmt: skip
_FORM = ("skip_special_tokens", "no_stop_trim")
"""These shape only the text of a reply, never its tokens."""
_ONLY_FORMLESS = {key: values for key, values in _ONLY.items() if key not in _FORM}
_KNOWN = _IGNORED | _ONLY.keys() | CHAT.keys() | {
    "messages", "tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options", "logprobs", "response_format",
    "chat_template_kwargs", "reasoning_effort", "session_id", "return_token_ids",
    "return_meta_info",
}  # fmt: skip
_OWN_KWARGS = ("add_generation_prompt", "continue_final_message", "messages", "tools", "tokenize")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


def parse_chat(body: Raw, evidence: Evidence, rules: Rules) -> ChatRequest:
    """Raises BadRequest naming the field and the remedy."""
    data = rules.load(body)
    refuse_unknown(data, _KNOWN)
    refuse_unless(data, _ONLY_FORMLESS if rules.form_ignored else _ONLY)
    own_session(data, rules.session_id)
    conversation = Conversation(
        messages=_messages(data),
        tools=_tools(data),
        choice=_choice(data.get("tool_choice")),
        parallel=typed(data, "parallel_tool_calls", (bool,), True),
        schema=_schema(data.get("response_format")),
        said=read(data, CHAT),
        template_kwargs=_template_kwargs(data),
    )
    options = typed(data, "stream_options", (dict,), {})
    refuse_unknown(options, ("include_usage", "include_obfuscation"), "stream_options.")
    stream = typed(data, "stream", (bool,), False)
    return_ids = typed(data, "return_token_ids", (bool,), False)
    if stream and return_ids:
        raise BadRequest("return_token_ids has no place in a stream: ask without stream", code="unsupported", param="return_token_ids")
    return ChatRequest(
        turn=turn_request(conversation, evidence, rules),
        stream=stream,
        include_usage=typed(options, "include_usage", (bool,), False),
        logprobs=typed(data, "logprobs", (bool,), False),
        return_token_ids=return_ids,
        return_meta_info=typed(data, "return_meta_info", (bool,), False),
        model=typed(data, "model", (str,), rules.model) or rules.model,
    )


def _messages(data: JSON) -> list[JSON]:
    messages = objects(data, "messages")
    if not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    return messages


def _tools(data: JSON) -> list[JSON]:
    tools = objects(data, "tools")
    for i, tool in enumerate(tools):
        function: Any = tool.get("function")
        if not isinstance(function, dict) or not isinstance(cast(JSON, function).get("name"), str):
            raise BadRequest(f"tools[{i}] must be a function with a name", param=f"tools[{i}]")
    return tools


def _choice(value: Any) -> ToolChoice:
    if value is None:
        return ToolChoice()
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return ToolChoice(value)
    function: Any = cast(JSON, value).get("function") if isinstance(value, dict) else None
    name: Any = cast(JSON, function).get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRequest("tool_choice must be auto, none, required, or name a function", code="unsupported", param="tool_choice")
    return ToolChoice("named", name)


def _schema(value: Any) -> JSON | None:
    """The JSON schema of a `response_format`; None for text."""
    if value is None:
        return None
    form = cast(JSON, value) if isinstance(value, dict) else {}
    named: Any = form.get("json_schema")
    schema: Any = cast(JSON, named).get("schema") if isinstance(named, dict) else None
    if form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return {"type": "object"}
    if form.get("type") == "json_schema" and isinstance(schema, dict):
        return cast(JSON, schema)
    message = "response_format must be text, json_object, or json_schema with a schema"
    raise BadRequest(message, code="unsupported", param="response_format")


def _template_kwargs(data: JSON) -> JSON:
    """Arguments of the chat template; how hard to reason is one of them, for templates that know it."""
    kwargs = typed(data, "chat_template_kwargs", (dict,), {})
    for name in _OWN_KWARGS:
        if name in kwargs:
            raise BadRequest(f"chat_template_kwargs.{name} is not the request's to set: leave it out", param="chat_template_kwargs")
    effort = typed(data, "reasoning_effort", (str,), None)
    if effort is None:
        return kwargs
    if effort not in _EFFORTS:
        raise BadRequest(f"reasoning_effort must be one of {', '.join(_EFFORTS)}", param="reasoning_effort")
    thinking = {"enable_thinking": False} if effort == "none" else {}
    return {"reasoning_effort": effort, **thinking, **kwargs}
