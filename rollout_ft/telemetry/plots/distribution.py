"""A figure of trials that met faults beside that of trials that met none.

Owns the stretches of it. Both are shares of their own kind: how many there are of each is in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rollout_ft.telemetry.svg import Scale, area, legend, line, panel, up_to
from rollout_ft.telemetry.words import share
from rollout_ft.trial.runner import TrialResult

_KEY = {"series-1": "met a fault", "series-0": "met none"}
DISTRIBUTION_KEY = legend(_KEY.items())


def distribution(
    results: Sequence[TrialResult], of: Callable[[TrialResult], float | None], x: Scale, label: Callable[[float], str], what: str
) -> str:
    """Of trials that met faults and of those that met none: the share of each that is in each of 20 stretches."""
    groups = {
        "series-1": [r for r in results if r.faults_survived and not r.lost],
        "series-0": [r for r in results if not r.faults_survived and not r.lost],
    }
    edges = np.linspace(x.low, x.high, 21)
    marks, tallest = dict[str, np.ndarray](), 0.0
    for kind, those in groups.items():
        values = np.array([value for r in those if (value := of(r)) is not None], dtype=np.float64)
        marks[kind] = np.histogram(np.clip(values, x.low, x.high), edges)[0] / max(1, len(values))
        tallest = max(tallest, float(marks[kind].max()))
    y = up_to([tallest])
    lines = [line(_outline(heights, edges, x, y), f"line {kind}", _KEY[kind]) for kind, heights in marks.items() if heights.any()]
    fills = [area(_outline(heights, edges, x, y), f"fill {kind}") for kind, heights in marks.items() if heights.any()]
    return f"<h3>{what}</h3>" + panel(
        f"{what} of trials that met faults, and of those that met none.", x, y, [*fills, *lines], label, share, height="10rem"
    )


def _outline(heights: np.ndarray, edges: np.ndarray, x: Scale, y: Scale) -> list[tuple[float, float]]:
    sides = [
        (x.at(float(edge)), y.at(float(h))) for left, right, h in zip(edges, edges[1:], heights, strict=False) for edge in (left, right)
    ]
    return [(sides[0][0], 0.0), *sides, (sides[-1][0], 0.0)]
