"""Reading one field of a body that nobody vouches for.

Owns the refusals that all dialects share. Knows no dialect. A refusal names the field.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.types import JSON


def typed(data: JSON, key: str, kinds: tuple[type, ...], default: Any) -> Any:
    """The value of a field, None being the same as not said; a bool is no number."""
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise BadRequest(f"{key} must be {' or '.join(k.__name__ for k in kinds)}", param=key)
    return value


def refuse_unknown(data: JSON, known: Iterable[str], where: str = "") -> None:
    """Nothing that is not listed is passed on to anybody."""
    unknown = sorted(data.keys() - set(known))
    if unknown:
        name = where + unknown[0]
        raise BadRequest(f"unknown field {name!r}: leave it out", code="unknown_field", param=name)


def refuse_unless(data: JSON, allowed: dict[str, tuple[Any, ...]]) -> None:
    """Fields that are known and can be honoured with these values only; None is the same as not said."""
    for key, values in allowed.items():
        value = data.get(key)
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            said = " or ".join(orjson.dumps(v).decode() for v in values)
            raise BadRequest(f"{key} is not supported" + (f": it can only be {said}" if said else ""), code="unsupported", param=key)


def objects(data: JSON, key: str) -> list[JSON]:
    """A list of objects; empty when not said."""
    value = cast("list[Any]", typed(data, key, (list,), []))
    if not {dict}.issuperset(map(type, value)):  # no loop of ours over a long history
        i = next(i for i, item in enumerate(value) if not isinstance(item, dict))
        raise BadRequest(f"{key}[{i}] must be an object", param=f"{key}[{i}]")
    return value


def dumped(value: Any, param: str) -> bytes:
    """A value as JSON with its keys in order. What can be read may be nested too deep to be written."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        raise BadRequest(f"{param} is nested too deep", param=param) from None


def own_session(data: JSON, session_id: str) -> None:
    """A session may be named in the body as well; it cannot be another than the key's."""
    named = typed(data, "session_id", (str,), session_id)
    if named != session_id:
        raise BadRequest(f"session_id is not this session's: leave it out, or send {session_id!r}", param="session_id")
