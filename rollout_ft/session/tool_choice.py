"""The grammar of an answer that must call a tool.

Owns the JSON schema of such an answer: an array of calls, each with a name and parameters. Pure.
"""

from __future__ import annotations

from typing import Any, cast

import orjson

from rollout_ft.types import JSON


def tool_choice_schema(tools: list[Any] | None, choice: Any, *, parallel: bool = True) -> str:
    """`sampling["json_schema"]` for `choice`: `required`, or `{"type": "function", "function": {"name": …}}`."""
    named: Any = cast(JSON, choice)["function"]["name"] if isinstance(choice, dict) else None
    functions = [t["function"] for t in tools or () if named in (None, t["function"]["name"])]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "parameters": f.get("parameters") or {"type": "object"}},
            "required": ["name", "parameters"],
        }
        for f in functions
    ]
    schema: JSON = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return orjson.dumps(schema if parallel else {**schema, "maxItems": 1}).decode()
