"""When two messages are the same message.

Owns the canonical form and the running digest over a conversation. Knows nothing of turns or tokens. Equal: the order
of keys, None and missing, content as a string or as a list of text parts, whitespace and key order inside tool-call
arguments, ids of tool calls, reasoning, whitespace around what an assistant said. The digest after message i depends
on the tools and on messages 0..i only, so that a prefix of a conversation has a prefix of its digests.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest

DIGEST_BYTES = 16
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def text_of(content: Any, where: str) -> str:
    """The text of a message's content: a string, None, or a list of text parts. Anything else is a 400 naming it."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content must be text or a list of text parts, not {type(content).__name__}", param=where)
    texts: list[str] = []
    for i, part in enumerate(cast("list[Any]", content)):
        kind: Any = cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else type(part).__name__
        text: Any = cast("dict[str, Any]", part).get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise BadRequest(f"{where}.content[{i}] is a {kind!r} part: only text can be rendered", param=where)
        texts.append(text)
    return "".join(texts)


def arguments(value: Any) -> bytes:
    """Tool-call arguments with keys in order and no whitespace; what is not JSON stays as it stands."""
    if value is None or value == "":
        return b"{}"
    text = value if isinstance(value, str) else ""
    try:
        return orjson.dumps(orjson.loads(text) if text else value, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, TypeError):
        if not text:
            raise BadRequest("arguments of a tool call are nested too deep", param="messages") from None
        # Not JSON, or nested deeper than can be written again: equal only to itself.
        return text.strip().encode("utf-8", "surrogatepass")


def message_key(message: dict[str, Any], where: str = "message") -> bytes:
    """Equal for messages that are the same message, different otherwise. Raises BadRequest for what is no message."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where}.role is {role!r}: use one of {', '.join(sorted(ROLES))}", param=where)
    text = text_of(message.get("content"), where)
    if role != "assistant":
        name = message.get("name")
        if not isinstance(name, str | None):
            raise BadRequest(f"{where}.name must be text", param=where)
        return orjson.dumps([role, text, name or ""])
    calls = [_call_key(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(_calls(message, where))]
    return orjson.dumps([role, text.strip(), calls])


def _calls(message: dict[str, Any], where: str) -> list[Any]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRequest(f"{where}.tool_calls must be a list", param=where)
    return cast("list[Any]", calls)


def _call_key(call: Any, where: str) -> list[str]:
    function: Any = cast("dict[str, Any]", call).get("function") if isinstance(call, dict) else None
    name: Any = cast("dict[str, Any]", function).get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRequest(f"{where} must be an object with a function that has a name", param=where)
    return [name, arguments(cast("dict[str, Any]", function).get("arguments")).decode("utf-8", "surrogatepass")]


def start_digest(tools: bytes) -> bytes:
    """The digest of a conversation without messages: other tools are another conversation."""
    return sha256(tools).digest()[:DIGEST_BYTES]


def extend_digest(digest: bytes, message: dict[str, Any], where: str = "message") -> bytes:
    """The digest after one more message."""
    return sha256(digest + message_key(message, where)).digest()[:DIGEST_BYTES]  # twice as fast as blake2b here


def running_digests(tools: bytes, messages: list[dict[str, Any]]) -> list[bytes]:
    """Digest before any message, after the first, …, after the last: `len(messages) + 1` of them."""
    digests = [start_digest(tools)]
    for i, message in enumerate(messages):
        digests.append(extend_digest(digests[-1], message, f"messages[{i}]"))
    return digests
