"""How many trials ran at each moment, and the axis of time that all plots of a run share.

Owns what a change is, and how many points are left of 50,000: the most within each stretch, so that no height is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rollout_ft.telemetry.history import FAULTS, History
from rollout_ft.telemetry.plots.faultmarks import KEYS, fault_marks
from rollout_ft.telemetry.svg import Scale, area, legend, line, panel, up_to
from rollout_ft.telemetry.words import UNITS, count, counted, duration

MAX_POINTS = 300


def time_scale(runs: Iterable[History]) -> Scale:
    """Of runs beside each other: the same for all, from the beginning of each."""
    length = max((seen.ended - seen.began for seen in runs), default=0.0) or 1.0
    return Scale(0.0, length, unit=next((unit for _, unit in UNITS if length >= 2 * unit), 1.0))


def trials_over_time(seen: History, x: Scale, most: int) -> str:
    """How many trials run, with every fault. `most`: at once, in any of the runs beside each other."""
    y = up_to([most])
    marks = [area(points := [(x.at(t), y.at(n)) for t, n in _steps(running(seen, x.high))], "s-running"), line(points, "l-running")]
    about = f"How many trials ran at each moment: at most {most:,} at once; {counted(len(seen.faults), 'fault')} are marked."
    drawn = panel(about, x, y, [*marks, *fault_marks(seen, x)], duration, count)
    kinds = dict.fromkeys(fault.kind for fault in seen.faults)
    return drawn + legend([("s-running", "trials running"), *((KEYS[kind], FAULTS[kind]) for kind in FAULTS if kind in kinds)])


def running(seen: History, length: float) -> list[tuple[float, int]]:
    """`(second, trials)` at each change, or the most within each of `MAX_POINTS` stretches."""
    changes: list[tuple[float, int]] = []
    for life in seen.lives.values():
        if life.began is not None:
            changes.append((life.began - seen.began, 1))
            if life.ended is not None:
                changes.append((life.ended - seen.began, -1))
    now, found = 0, [(0.0, 0)]
    for time, change in sorted(changes):
        now += change
        found.append((time, now))
    found.append((max(seen.ended - seen.began, found[-1][0]), now))
    return found if len(found) <= MAX_POINTS else _highest(found, length)


def _highest(found: list[tuple[float, int]], length: float) -> list[tuple[float, int]]:
    width = (length or 1.0) / MAX_POINTS
    highest: dict[int, int] = {}
    for (start, n), (end, _) in pairwise(found):
        for i in range(int(start / width), min(int(end / width), MAX_POINTS - 1) + 1):
            highest[i] = max(highest.get(i, 0), n)
    return [(i * width, n) for i, n in sorted(highest.items())] + [found[-1]]


def _steps(found: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """A value holds until the next."""
    return [point for (t, n), (later, _) in pairwise(found) for point in ((t, n), (later, n))] + list(found[-1:])
