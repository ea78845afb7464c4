"""In what a message differs that is the same message.

Owns the names of the leniencies. Pure, and asked only where two spellings differ: once for each message of a turn, when
a request first contains it.
"""

from __future__ import annotations

from typing import Any, cast

from rollout_ft.session.normalizers import Normalize, alike
from rollout_ft.types import JSON

REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_blocks")
_OURS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", *REASONING})


def leniencies(stored: JSON, sent: JSON, normalize: Normalize | None = None) -> set[str]:
    """Which leniencies it takes to find that `sent` is what was `stored`; none when they are equal."""
    if stored == sent:
        return set()
    found = _content(stored.get("content"), sent.get("content"), normalize) | _reasoning(stored, sent)
    calls: list[JSON] = stored.get("tool_calls") or []
    again: list[JSON] = sent.get("tool_calls") or []
    for one, other in zip(calls, again, strict=False):
        found |= _call(one, other)
    if (stored.get("tool_call_id") or None) != (sent.get("tool_call_id") or None):
        found.add("ids_renamed")
    if len(calls) != len(again) or any(stored.get(k) != sent.get(k) for k in ("role", "name") if stored.get(k) or sent.get(k)):
        found.add("other")
    if any(stored.get(k) != sent.get(k) for k in (stored.keys() | sent.keys()) - _OURS if stored.get(k) or sent.get(k)):
        found.add("extra_fields")
    return found or {"empty_fields"}


def _content(stored: Any, sent: Any, normalize: Normalize | None) -> set[str]:
    if stored == sent or not (stored or sent):
        return set()
    found: set[str] = set()
    if isinstance(stored, list) or isinstance(sent, list):
        found.add("content_parts")
    one, other = _text(stored), _text(sent)
    if one.strip() != other.strip():
        found.add("normalized" if alike(normalize, one, other) else "other")
    elif one != other:
        found.add("whitespace")
    return found


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in cast("list[JSON]", content))
    return content or ""


def _reasoning(stored: JSON, sent: JSON) -> set[str]:
    had, has = ([message.get(k) for k in REASONING if message.get(k)] for message in (stored, sent))
    if had == has:
        return set()
    return {"reasoning_changed" if has else "reasoning_dropped"}


def _call(stored: JSON, sent: JSON) -> set[str]:
    found: set[str] = set()
    one: JSON = stored["function"]
    other: JSON = sent["function"]
    if stored.get("id") != sent.get("id"):
        found.add("ids_renamed")
    if one.get("arguments") != other.get("arguments"):
        found.add("arguments_reformatted")
    if one.get("name") != other.get("name"):
        found.add("other")
    ours = {"id", "type", "function"}
    if any(stored.get(k) != sent.get(k) for k in (stored.keys() | sent.keys()) - ours):
        found.add("extra_fields")
    return found
