"""`tool_choice: required`, or a named function: the grammar that makes the engine write calls and nothing else.

Owns the JSON schema. Pure. It is the one that SGLang uses for models without a format of their own: an array of
`{"name": …, "parameters": …}`, so that it holds for every engine that takes a `json_schema`.
"""

from __future__ import annotations

from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.types import JSON

_SHARED = ("$defs", "definitions")


def tool_choice_schema(tools: list[Any] | None, choice: Any, *, parallel: bool = True) -> str:
    """`sampling["json_schema"]` for `choice`: `required`, or `{"type": "function", "function": {"name": …}}`.

    Raises BadRequest when no tool can be chosen.
    """
    functions = [cast(JSON, tool["function"]) for tool in tools or ()]
    if choice != "required":
        name = _name(choice)
        functions = [f for f in functions if f.get("name") == name]
    if not functions:
        raise BadRequest("tool_choice names no function that is among the tools", param="tool_choice")
    items = [_call_schema(f) for f in functions]
    schema: JSON = {"type": "array", "minItems": 1, "items": items[0] if len(items) == 1 else {"anyOf": items}}
    if not parallel:
        schema["maxItems"] = 1
    for key in _SHARED:  # references start at the root of the schema
        shared = _shared(functions, key)
        if shared:
            schema[key] = shared
    try:
        return orjson.dumps(schema).decode()
    except TypeError:
        raise BadRequest("tools are nested too deep", param="tools") from None


def _name(choice: Any) -> Any:
    function: Any = cast(JSON, choice).get("function") if isinstance(choice, dict) else None
    return cast(JSON, function).get("name") if isinstance(function, dict) else None


def _call_schema(function: JSON) -> JSON:
    parameters: Any = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": [function["name"]]}, "parameters": parameters},
        "required": ["name", "parameters"],
    }


def _shared(functions: list[JSON], key: str) -> JSON:
    shared: JSON = {}
    for function in functions:
        parameters: Any = function.get("parameters")
        found: Any = cast(JSON, parameters).get(key) if isinstance(parameters, dict) else None
        for name, schema in (cast(JSON, found) if isinstance(found, dict) else {}).items():
            if shared.setdefault(name, schema) != schema:
                raise BadRequest(f"{key}.{name} means different things in different tools: rename one", param="tools")
    return shared
