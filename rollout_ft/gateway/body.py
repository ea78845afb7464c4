"""The JSON of a body that nobody vouches for.

Owns what counts as a body. Knows no dialect.
"""

from __future__ import annotations

from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.types import JSON


def load_json(body: bytes) -> JSON:
    """The object in a body; NaN, lone surrogates and what is not an object are refused."""
    try:
        value: Any = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"the body is not JSON: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    return cast(JSON, value)
