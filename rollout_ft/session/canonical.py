"""When two messages are the same message.

Owns the canonical form and the running digest over a conversation. Knows nothing of turns or tokens. Equal: the order
of keys, None and missing, content as a string or as a list of text parts, whitespace, key order and `1.0` for `1`
inside tool-call arguments, ids of tool calls, reasoning, fields that are not ours, whitespace around what an assistant
said. The digest after message i depends on the tools and on messages 0..i only, so that a prefix of a conversation has
a prefix of its digests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.types import JSON

DIGEST_BYTES = 16
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
REASONING_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
_FLOAT = re.compile(rb"\d\.0|\de")

MessageKey = Callable[[JSON, str], bytes]
"""`(message, where it stands)` to bytes that are equal for messages that are the same message."""


def text_of(content: Any, where: str) -> str:
    """The text of a message's content: a string, None, or a list of text parts. Anything else is a 400 naming it.

    Parts that hold reasoning are no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content must be text or a list of text parts, not {type(content).__name__}", param=where)
    texts: list[str] = []
    for i, part in enumerate(cast("list[Any]", content)):
        kind: Any = cast(JSON, part).get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(kind, str) and kind in REASONING_PARTS and isinstance(part, dict):
            continue
        text: Any = cast(JSON, part).get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise BadRequest(f"{where}.content[{i}] is a {kind!r} part: only text can be rendered", param=where)
        texts.append(text)
    return "".join(texts)


def arguments(value: Any) -> bytes:
    """Tool-call arguments with keys in order and no whitespace; what is not JSON stays as it stands."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return b"{}"
    text = value if isinstance(value, str) else ""
    try:
        parsed: Any = orjson.loads(text) if text else value
        plain = orjson.dumps(parsed, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, TypeError):
        if not text:
            raise BadRequest("arguments of a tool call are nested too deep", param="messages") from None
        # Not JSON, or nested deeper than can be written again: equal only to itself.
        return text.strip().encode("utf-8", "surrogatepass")
    return orjson.dumps(_whole(parsed), option=orjson.OPT_SORT_KEYS) if _FLOAT.search(plain) else plain


def _whole(value: Any) -> Any:
    """JavaScript writes 1.0 as 1: whole numbers are integers. Not deeper than orjson can write."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list):
        return [_whole(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {k: _whole(each) for k, each in cast(JSON, value).items()}
    return value


def message_key(message: JSON, where: str = "message") -> bytes:
    """Equal for messages that are the same message, different otherwise. Raises BadRequest for what is no message."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where}.role is {role!r}: use one of {', '.join(sorted(ROLES))}", param=where)
    content: Any = message.get("content")
    text = text_of(content, where)
    if role != "assistant":
        if isinstance(content, list) and any(part["type"] in REASONING_PARTS for part in cast("list[JSON]", content)):
            raise BadRequest(f"{where}.content has reasoning, which only an assistant has", param=where)
        name = message.get("name")
        if not isinstance(name, str | None):
            raise BadRequest(f"{where}.name must be text", param=where)
        if message.get("tool_calls"):
            raise BadRequest(f"{where} has tool_calls, which only an assistant has: leave them out", param=where)
        return orjson.dumps([role, text, name or ""])
    calls = [_call_key(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls_of(message, where))]
    return orjson.dumps([role, text.strip(), calls])


def calls_of(message: JSON, where: str) -> list[Any]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRequest(f"{where}.tool_calls must be a list", param=where)
    return cast("list[Any]", calls)


def _call_key(call: Any, where: str) -> list[str]:
    function: Any = cast(JSON, call).get("function") if isinstance(call, dict) else None
    name: Any = cast(JSON, function).get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRequest(f"{where} must be an object with a function that has a name", param=where)
    return [name, arguments(cast(JSON, function).get("arguments")).decode("utf-8", "surrogatepass")]


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a conversation has come: its digest, and the ids of the tool calls that wait for a result."""

    digest: bytes
    waiting: tuple[Any, ...] = ()

    def after(self, message: JSON, where: str = "message", key: MessageKey = message_key) -> Mark:
        """One message later. Ids may be renamed or left out: a result answers the first call that waits, unless its
        id says that it answers another, which makes it another result."""
        data, waiting, role = self.digest + key(message, where), self.waiting, message["role"]
        if role == "tool" and waiting:
            said: Any = message.get("tool_call_id")
            at = waiting.index(said) if said in waiting else 0
            waiting = waiting[:at] + waiting[at + 1 :]
            data += b"%d" % at if at else b""
        elif role == "assistant":
            waiting = tuple(call.get("id") for call in calls_of(message, where))
        elif role != "tool":
            waiting = ()
        return Mark(sha256(data).digest()[:DIGEST_BYTES], waiting)  # twice as fast as blake2b here


def start(tools: bytes) -> Mark:
    """A conversation without messages: other tools are another conversation."""
    return Mark(sha256(tools).digest()[:DIGEST_BYTES])


def running_digests(tools: bytes, messages: list[JSON], key: MessageKey = message_key) -> list[bytes]:
    """Digest before any message, after the first, …, after the last: `len(messages) + 1` of them."""
    mark = start(tools)
    digests = [mark.digest]
    for i, message in enumerate(messages):
        mark = mark.after(message, f"messages[{i}]", key)
        digests.append(mark.digest)
    return digests
