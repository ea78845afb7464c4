"""A body to JSON that nothing behind it can choke on.

Owns what is refused before any field is looked at: what is not JSON (NaN, numbers beyond a double, lone surrogates,
raw control characters), what nests too deep to be written again, and a key that an object has twice, of which every
reader picks another. Pure. Control characters that are escaped are text and stay.

The subtle invariant: duplicates are found by comparing what was written with what was read. A body that is written
again to the same bytes has none, which is the case for most clients and costs half a reading; else its keys are counted.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.types import JSON, Raw

MAX_DEPTH = 64
_SPACES = (b" ", b"\t", b"\r", b"\n")
_SPACED = re.compile(rb'"[ \t\r\n]+:')
_MAX_BACKSLASHES = 8
_CONTAINERS = frozenset({dict, list})


def load_json(body: Raw, max_depth: int = MAX_DEPTH) -> JSON:
    """The object in a body. Raises BadRequest saying what is wrong with it."""
    try:
        value: Any = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"the body is not JSON that can be read: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    if _written_again(value, max_depth) != body and _written_keys(body) != _count_keys(value):
        _refuse_duplicates(body)
    return cast(JSON, value)


def check_id(value: str, name: str, limit: int) -> str:
    """A name that a client gave, as from a header: short, and of characters that can be seen."""
    if len(value) > limit:
        raise BadRequest(f"{name} is longer than {limit} characters (gateway.max_id_chars)", code="id_too_long", param=name)
    if not value.isascii() or not value.isprintable():
        raise BadRequest(f"{name} contains characters other than those of ASCII that can be printed", code="invalid_id", param=name)
    return value


def _deepest() -> int:
    """How deep a value may nest for orjson to write it."""
    value: list[Any] = []
    depth = 1
    with contextlib.suppress(TypeError):
        while orjson.dumps(value):
            value, depth = [value], depth + 1
    return depth - 1


_DEEPEST = _deepest()


def _written_again(value: Any, max_depth: int) -> bytes:
    """The value without any space. Raises BadRequest where it nests too deep: inside so many lists that orjson's own
    limit is ours, which spares looking through it."""
    around = _DEEPEST - max_depth
    for _ in range(around):
        value = [value]
    try:
        return orjson.dumps(value)[around:-around]
    except TypeError:
        raise BadRequest(f"the body nests deeper than {max_depth} (gateway.max_json_depth)", code="too_deep") from None


def _count_keys(value: Any) -> int:
    """How many keys all objects in a value have."""
    keys, level = 0, [value]
    while level:
        below: list[Any] = []
        for node in level:
            children: Iterable[Any] = node
            if type(node) is dict:
                keys += len(cast(JSON, node))
                children = cast(JSON, node).values()
            below += [child for child in children if type(child) in _CONTAINERS]
        level = below
    return keys


def _written_keys(body: Raw) -> int:
    """How many keys are written in a valid JSON text; -1 where that is not cheap to say.

    A key ends in `":`, and so does text in which a quote is escaped, by an odd number of backslashes. Of those with
    at least n backslashes, for n = 0, 1, 2, …, the alternating sum is the number of those with an even one.
    """
    if any(space + b":" in body for space in _SPACES) and _SPACED.search(body):
        return -1
    total, sign, end = 0, 1, b'":'
    for _ in range(_MAX_BACKSLASHES):
        found = body.count(end)
        if not found:
            return total
        total, sign, end = total + sign * found, -sign, b"\\" + end
    return -1


def _refuse_duplicates(body: Raw) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadRequest(f"an object has the key {key[:80]!r} twice: leave one out", code="duplicate_key", param=key[:80])
            seen.add(key)

    json.loads(body, object_pairs_hook=check, parse_int=_nothing, parse_float=_nothing)


def _nothing(_: str) -> None:
    """Numbers are read already; those with thousands of digits cost a lot as integers."""
