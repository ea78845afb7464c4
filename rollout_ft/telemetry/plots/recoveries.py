"""How long recoveries took: the share that took at most so long, by reason.

Owns the scale, which is one for all runs beside each other: decades, and none of them below a millisecond.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rollout_ft.telemetry.history import History
from rollout_ft.telemetry.svg import SIZE, Scale, decades, legend, line, panel
from rollout_ft.telemetry.words import counted, duration, share

MAX_POINTS, LEAST_S = 300, 0.001


def recovery_times(seen: History, x: Scale) -> str:
    """The share of recoveries that took at most so long, by reason."""
    by_reason: dict[str, list[float]] = defaultdict(list)
    for recovery in seen.recoveries:
        by_reason[recovery.reason].append(max(recovery.seconds, LEAST_S))
    reasons = sorted(by_reason, key=lambda reason: (-len(by_reason[reason]), reason))
    marks = [_cumulative(sorted(by_reason[reason]), x, f"series-{i % 6}", reason) for i, reason in enumerate(reasons)]
    about = f"Share of {counted(len(seen.recoveries), 'recovery', 'recoveries')} that took at most so long."
    key = legend((f"series-{i % 6}", f"{reason} ({len(by_reason[reason]):,})") for i, reason in enumerate(reasons))
    return panel(about, x, Scale(0, 1.0), marks, duration, share) + key


def recovery_scale(runs: Sequence[History]) -> Scale:
    return decades([recovery.seconds for seen in runs for recovery in seen.recoveries], LEAST_S)


def _cumulative(took: list[float], x: Scale, kind: str, reason: str) -> str:
    """At most `MAX_POINTS` of its steps: quantiles."""
    n = len(took)
    at = range(n) if n <= MAX_POINTS else [round(i * (n - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)]
    points = [(x.at(took[0]), 0.0)]
    for i in at:
        points += [(x.at(took[i]), points[-1][1]), (x.at(took[i]), SIZE * (i + 1) / n)]
    return line(
        points,
        f"line {kind}",
        f"{reason}: half within {duration(float(np.median(took)))}, all within {duration(took[-1])}",
    )
