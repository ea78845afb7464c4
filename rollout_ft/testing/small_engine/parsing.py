"""What `/parse_function_call` and `/separate_reasoning` find, for the parsers `hermes`, `qwen25` and `qwen3`.

Owns what SGLang's parsers of these names do, with all that they drop: text after the first call, calls to tools that
nobody declared, calls that do not parse. Must not know how anything else reads the same text: whoever asks has to
cope with this.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from rollout_ft.testing.small_engine.protocol import JSON

_HERMES = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)
_QWEN25 = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
TOOL_PARSERS, REASONING_PARSERS = ("hermes", "qwen25"), ("qwen3", "qwen3-thinking")


def function_calls(text: str, tools: list[Any], parser: str) -> tuple[str, list[JSON]]:
    """`(normal_text, calls)`."""
    opening = "<tool_call>" if parser == "hermes" else "<tool_call>\n"
    if not tools or opening not in text:
        return text, []
    head = text[: text.index(opening)].strip()
    if parser == "hermes":
        try:
            sources = [first or second for first, second in _HERMES.findall(text)]
            return head, [call for source in sources if source for call in _calls(json.loads(source.strip()), tools)]
        except Exception:
            return text, []
    calls: list[JSON] = []
    for source in _QWEN25.findall(text):
        try:
            value: Any = json.loads(source.strip())
        except json.JSONDecodeError:
            continue
        calls += _calls(value, tools)
    return head, calls


def separate_reasoning(text: str, parser: str) -> tuple[str, str]:
    """`(reasoning_text, text)`."""
    if parser != "qwen3-thinking" and "<think>" not in text:
        return "", text
    while text.startswith("<think>"):
        text = text.removeprefix("<think>")
    if "</think>" in text:
        reasoning, _, rest = text.partition("</think>")
        return reasoning, rest
    call = text.find("<tool_call>")
    return (text, "") if call < 0 else (text[:call], text[call:])


def _calls(value: Any, tools: list[Any]) -> list[JSON]:
    index = {tool["function"]["name"]: i for i, tool in enumerate(tools)}
    made: list[JSON] = []
    for act in cast("list[Any]", value if isinstance(value, list) else [value]):
        name = act.get("name")
        if name and name in index:
            arguments = act.get("parameters") or act.get("arguments", {})
            made.append({"tool_index": index[name], "name": name, "parameters": json.dumps(arguments, ensure_ascii=False)})
    return made
