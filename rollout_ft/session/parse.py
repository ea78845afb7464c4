"""Sampled token ids to text, and what a parser found in it to the assistant message that a client gets.

Owns the cutting of stop tokens and stop strings and the form of the message. Knows no format of tool calls. Pure; the
same ids and findings always give the same message, ids of tool calls included. A message has `content: null` only
beside tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from rollout_ft.session.calls import Call
from rollout_ft.session.render import Renderer
from rollout_ft.session.tree import ids_of
from rollout_ft.types import JSON

_THINKING = ("<think>", "<mm:think>", "[THINK]", "◁think▷", "<|START_THINKING|>")
_TAIL_BYTES = 4 * 32


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a parser found in a text; `failed`: it could not read it, and `content` is all of it."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    failed: bool = False


def sampled_text(
    output_ids: list[int], renderer: Renderer, *, stop: Sequence[str], keep_special: bool = False, closers: Set[str] = frozenset()
) -> str:
    """The text of all ids at once, up to the first stop string and without the stop token that ended it.

    A stop token whose text is in `closers` is part of what a parser reads.
    """
    ids = output_ids
    if ids and ids[-1] in renderer.stop_ids and renderer.text(ids[-1:], keep_special=True) not in closers:
        ids = ids[:-1]
    text = renderer.text(ids, keep_special=keep_special)
    cuts = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return text[: min(cuts)] if cuts else text


def opened_thinking(prompt_ids: bytes, renderer: Renderer) -> str:
    """The tag that a prompt ends with when its template has opened the reasoning for the model, else nothing."""
    tail = renderer.text(ids_of(prompt_ids[-_TAIL_BYTES:]), keep_special=True).rstrip()
    return next((tag for tag in _THINKING if tail.endswith(tag)), "")


def assistant_message(parsed: Parsed, turn_key: str) -> JSON:
    """The message, with ids of tool calls that depend on the turn alone."""
    message: JSON = {"role": "assistant", "content": parsed.content or (None if parsed.calls else "")}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        message["tool_calls"] = [
            {"id": f"call_{turn_key[:16]}_{i}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for i, call in enumerate(parsed.calls)
        ]
    return message
