"""The routed experts of a path, out of what its turns have of them.

Owns which turn each row comes from, which rows are missing, and how rows look in JSON. Pure. Row i routed token i when
token i + 1 was made, so that a path has one row less than tokens: to replay the forward pass over a path's tokens but the
last. What no turn has is missing, filled with 0, and only the ranges tell it from expert 0.

The subtle invariant: a row depends on its token and those before it. It is right on every path that shares them, so that
what a later turn trimmed or branched off does not matter to the rows before.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from rollout_ft.types import JSON, RoutedExperts

Rows = Mapping[str, bytes]
"""The payloads of turns, by turn."""
STEP_BYTES = 3 * 2**18


@dataclass(frozen=True, slots=True)
class Part:
    """A turn on a path: how many tokens the path has up to its end, and its rows where they are there."""

    end: int
    routed: RoutedExperts | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows `start` to `end` of the path are of part `part`."""

    start: int
    end: int
    part: int


@dataclass(frozen=True, slots=True)
class Layout:
    """In ranges: every row is in one stretch, or missing."""

    rows: int
    stretches: tuple[Stretch, ...]
    missing: tuple[tuple[int, int], ...]
    substituted: tuple[tuple[int, int], ...]


def lay_out(parts: Sequence[Part]) -> Layout:
    """The first turn that has a row gives it: there it was captured when the next token was made, if anywhere."""
    rows = max(0, parts[-1].end - 1) if parts else 0
    source, again = np.full(rows, -1, np.int32), np.zeros(rows, np.bool_)
    for number, part in reversed(list(enumerate(parts))):
        if part.routed is None:
            continue
        start, end = part.routed.start, min(part.routed.start + part.routed.rows, part.end, rows)
        source[start:end], again[start:end] = number, False
        for a, b in part.routed.substituted:
            again[a : min(b, end)] = True
    stretches = tuple(Stretch(a, b, int(source[a])) for a, b in _runs(source) if source[a] >= 0)
    missing = tuple((a, b) for a, b in _runs(source) if source[a] < 0)
    return Layout(rows, stretches, missing, tuple((a, b) for a, b in _runs(again) if again[a]))


def _runs(values: NDArray[Any]) -> list[tuple[int, int]]:
    """The longest ranges of equal values."""
    if not len(values):
        return []
    cuts = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(values)], strict=True))


def routed_fields(turns: Sequence[tuple[str, int, RoutedExperts | None]], rows: Rows) -> JSON:
    """What a path says of its routed experts; of each turn its key, where it ends, and what its record says.

    `routed_experts` is an array of shape (tokens - 1, layers, topk), uint8 for up to 256 experts and else uint16; None
    when there is no row at all. `routed_experts_partial` is true when a row is missing or a substitute; the ranges are
    `[start, end)` of rows.
    """
    shapes = [r for key, _, r in turns if r is not None and key in rows]
    like = shapes[0] if shapes else None
    parts = [Part(end, r if r is not None and like is not None and key in rows and _alike(r, like) else None) for key, end, r in turns]
    layout = lay_out(parts)
    return {
        "routed_experts": _filled(layout, parts, [rows.get(key, b"") for key, _, _ in turns], like) if like is not None else None,
        "routed_experts_partial": bool(layout.missing or layout.substituted),
        "routed_experts_missing": [list(r) for r in layout.missing],
        "routed_experts_substituted": [list(r) for r in layout.substituted],
    }


def _alike(a: RoutedExperts, b: RoutedExperts) -> bool:
    return (a.layers, a.topk, a.dtype) == (b.layers, b.topk, b.dtype)


def _filled(layout: Layout, parts: Sequence[Part], payloads: Sequence[bytes], like: RoutedExperts) -> NDArray[Any]:
    dtype = np.dtype(like.dtype).newbyteorder("<")
    made = np.zeros((layout.rows, like.layers, like.topk), dtype)
    for stretch in layout.stretches:
        routed = parts[stretch.part].routed
        assert routed is not None
        own = np.frombuffer(payloads[stretch.part], dtype).reshape(routed.rows, like.layers, like.topk)
        made[stretch.start : stretch.end] = own[stretch.start - routed.start : stretch.end - routed.start]
    return made


def array_json(array: NDArray[Any]) -> orjson.Fragment:
    """`{data, dtype, shape}`, the data in base64: a tenth of what lists of numbers would be, and read in one go."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    text = b"".join(binascii.b2a_base64(flat[i : i + STEP_BYTES], newline=False) for i in range(0, len(flat), STEP_BYTES))
    about = orjson.dumps({"dtype": array.dtype.name, "shape": array.shape})
    return orjson.Fragment(b'{"data":"' + text + b'",' + about[1:])


def array_of(told: Any) -> NDArray[Any]:
    """The array, from what a trajectory's JSON says."""
    if isinstance(told, np.ndarray):
        return cast("NDArray[Any]", told)
    dtype = np.dtype(told["dtype"]).newbyteorder("<")
    return np.frombuffer(base64.b64decode(told["data"]), dtype).reshape(told["shape"])
