"""A conversation, as every dialect of messages understands it, to the turn that it asks for.

Owns what tools, the choice among them and a demanded form of the answer mean for the prompt and the grammar. Pure. The
messages are OpenAI's whatever dialect they came in, so that one session may be used through several.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.dialects.base import Evidence, Rules
from rollout_ft.gateway.dialects.fields import dumped
from rollout_ft.gateway.dialects.sampling import settle, with_template
from rollout_ft.session.canonical import running_digests
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tool_choice import tool_choice_schema
from rollout_ft.types import JSON


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a tool must, may or must not be called; `name`: which one must."""

    kind: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""

    def openai(self) -> Any:
        """As OpenAI writes it."""
        return {"type": "function", "function": {"name": self.name}} if self.kind == "named" else self.kind


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a body says, without its form. `said` are sampling parameters by the engine's names."""

    messages: list[JSON]
    tools: list[JSON] = field(default_factory=list[JSON])
    choice: ToolChoice = ToolChoice()
    parallel: bool = True
    schema: JSON | None = None
    """The JSON schema that the answer must follow."""
    said: JSON = field(default_factory=dict[str, Any])
    template_kwargs: JSON = field(default_factory=dict[str, Any])


def turn_request(c: Conversation, evidence: Evidence, rules: Rules) -> TurnRequest:
    """The turn that is asked for. Raises BadRequest naming what cannot be."""
    if len(c.messages) > rules.max_messages:
        raise BadRequest(f"more than {rules.max_messages} messages (session.max_messages)", param="messages")
    if len(c.tools) > rules.max_tools:
        raise BadRequest(f"more than {rules.max_tools} tools (session.max_tools)", param="tools")
    tools = c.tools if c.tools and c.choice.kind != "none" else None
    tool_bytes = dumped(tools, "tools") if tools else b""
    schema = _schema(c, tools)
    said = {**c.said, "json_schema": schema} if schema else c.said
    sampling = settle(said, rules.sampling, force=rules.force, max_output_tokens=rules.max_output_tokens)
    return TurnRequest(
        request_id=evidence.request_id,
        messages=c.messages,
        digests=running_digests(tool_bytes, c.messages),
        tools=tool_bytes,
        tool_list=tools,
        sampling=with_template(sampling, c.template_kwargs),
        retry=evidence.retry,
        idempotency_key=evidence.idempotency_key,
        forced_call=c.choice.kind in ("required", "named"),
        resent=evidence.resent,
    )


def _schema(c: Conversation, tools: list[JSON] | None) -> str:
    """The one grammar that the answer must follow."""
    choice = c.choice
    if choice.kind in ("required", "named"):
        if not tools or (choice.kind == "named" and choice.name not in (t["function"]["name"] for t in tools)):
            raise BadRequest("tool_choice demands a tool that tools does not have", param="tool_choice")
        if c.schema is not None:
            raise BadRequest("tool_choice demands a tool call and response_format a text: leave one out", param="response_format")
        return tool_choice_schema(tools, choice.openai(), parallel=c.parallel)
    if tools and not c.parallel:
        message = "one tool call at most cannot be enforced: leave parallel_tool_calls out, or demand a call by tool_choice"
        raise BadRequest(message, code="unsupported", param="parallel_tool_calls")
    return dumped(c.schema, "response_format").decode() if c.schema is not None else ""
