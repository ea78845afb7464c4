"""Tool calls that are written as JSON objects: `{"name": …, "arguments": …}`.

Owns where a JSON value in a text ends and what of an object is a call. Pure. Arguments stay the text that was sampled:
read and written again, large numbers, repeated keys and spaces would change. The subtle invariant: whatever starts
inside a string of another value is out of step with it quote by quote, and nothing but a string may hold a `<`; so of
all values that are tried, one per opening tag, no more than two ever get past the same character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

_TOKEN = re.compile(
    r"""[\s,:]*+(?:("(?:[^"\\]++|\\.)*+(?:"|\Z))|([\[{])|([\]}])|-?[0-9][-+.0-9eE]*+|true|false|null)""",
    re.DOTALL,
)  # fmt: skip
_GAP = re.compile(r"[\s,:]*+")


@dataclass(frozen=True, slots=True)
class Call:
    """`arguments` is text: JSON, if the model wrote JSON."""

    name: str
    arguments: str


def extent(text: str, at: int) -> tuple[int, bool]:
    """Where the JSON value at `at` ends, as far as it was looked at; False when there is none that ends."""
    depth = 0
    while (token := _TOKEN.match(text, at)) is not None:
        at = token.end()
        depth += (token[2] is not None) - (token[3] is not None)
        if depth <= 0:
            return at, depth == 0
    return at, False


def call_of(source: str) -> Call | None:
    """The call that a JSON object makes, or None."""
    try:
        value: Any = orjson.loads(source)
        orjson.dumps(value)  # what is nested deeper than can be written again stays text
    except (orjson.JSONDecodeError, TypeError):
        return None
    if not isinstance(value, dict):
        return None
    members = _members(source)
    name: Any = orjson.loads(members.get("name", "null"))
    if not isinstance(name, str) or not name:
        return None
    arguments = members.get("arguments", members.get("parameters", "{}"))
    return Call(name, orjson.loads(arguments) if arguments.startswith('"') else arguments)


def calls_of(source: str) -> list[Call] | None:
    """The calls of a JSON array of objects, or of a single one; None unless all of them are calls."""
    try:
        value: Any = orjson.loads(source)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, list):
        call = call_of(source.strip())
        return [call] if call is not None else None
    calls = [call_of(element) for element in _elements(source)]
    made = [call for call in calls if call is not None]
    return made if made and len(made) == len(calls) else None


def _members(source: str) -> dict[str, str]:
    """The members of a valid JSON object, each value as it was written; of a repeated key, the last."""
    values = list(_elements(source))
    return {orjson.loads(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _elements(source: str) -> list[str]:
    """What stands between the commas and colons of a valid JSON array or object."""
    found: list[str] = []
    at = _start(source, source.index("[") + 1 if source.lstrip().startswith("[") else source.index("{") + 1)
    while True:
        end, whole = extent(source, at)
        if not whole:
            return found
        found.append(source[at:end])
        at = _start(source, end)


def _start(source: str, at: int) -> int:
    gap = _GAP.match(source, at)
    return gap.end() if gap else at
