"""Tool calls between `<tool_call>` tags and reasoning between `<think>` tags, read without anybody's help.

Owns the format of Hermes and Qwen: for models behind the small engine, and wherever SGLang's own parsers are not. Pure,
in linear time, for any text: what is no call stays text, all of it, in its place.
"""

from __future__ import annotations

import re

from rollout_ft.session.calls import Call, call_of, extent

_OPEN = re.compile(r"<tool_call>\s*+")
_CLOSE = re.compile(r"\s*+</tool_call>")
_THINK = re.compile(r"\s*+(?:<think>)++")


def tool_calls(text: str) -> tuple[str, list[Call]]:
    """`(content, calls)`: the text around the calls, and the calls."""
    calls: list[Call] = []
    kept: list[str] = []
    end = at = 0
    while (opening := _OPEN.search(text, at)) is not None:
        at = opening.end()
        stop, whole = extent(text, at)
        close = _CLOSE.match(text, stop) if whole else None
        if close is None:
            continue
        call = call_of(text[at:stop])
        at = close.end()
        if call is not None:
            calls.append(call)
            kept.append(text[end : opening.start()])
            end = at
    return ("".join([*kept, text[end:]]).strip(), calls) if calls else (text, [])


def reasoning(text: str) -> tuple[str, str]:
    """`(reasoning, rest)`. Reasoning that does not end goes on to the first tool call, or to the end of the text."""
    start = _THINK.match(text)
    if start is None:
        return "", text
    body = text[start.end() :]
    thought, closed, rest = body.partition("</think>")
    if closed:
        return thought, rest
    call = body.find("<tool_call>")
    return (body, "") if call < 0 else (body[:call], body[call:])
