"""Tokens: those in trajectories and those in vain, in all and over time.

Owns the stretches of time, in which a trial's tokens are counted where it ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout_ft.telemetry.history import History
from rollout_ft.telemetry.plots.faultmarks import fault_marks
from rollout_ft.telemetry.svg import SIZE, Scale, bar, box, panel, up_to
from rollout_ft.telemetry.words import count, counted, duration
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

MAX_BINS = 60


def token_split(totals: JSON) -> str:
    """What was sampled: in trajectories, and in vain."""
    useful = totals["tokens_generated"] - totals["tokens_wasted"]
    parts = [
        ("t-useful", useful, f"{useful:,} in trajectories"),
        ("t-wasted", totals["tokens_wasted"], f"{totals['tokens_wasted']:,} wasted"),
    ]
    reused = [
        ("t-reused", totals["tokens_reused"], f"{totals['tokens_reused']:,} reused"),
        ("none", totals["tokens_generated"] - totals["tokens_reused"], ""),
    ]
    return bar(parts) + bar(reused if totals["tokens_reused"] else [])


def tokens_over_time(x: Scale, bins: Sequence[JSON], most: float, seen: History) -> str:
    """Of the trials that ended within each stretch of time. `most`: in one stretch, in any of the runs beside each other."""
    y, width = up_to([most]), SIZE / MAX_BINS
    marks: list[str] = []
    for each in bins:
        left, useful, wasted = width * each["bin"], y.at(each["useful"]), y.at(each["wasted"])
        at, trials = duration(x.high * each["bin"] / MAX_BINS), counted(each["trials"], "trial")
        said = f"after {at}: {each['useful']:,} in trajectories, {each['wasted']:,} wasted, of {trials}"
        marks += [box(left, 0, width * 0.9, useful, "t-useful", said), box(left, useful, width * 0.9, wasted, "t-wasted", said)]
    about = "Tokens of the trials that ended within each stretch of time: in trajectories, and wasted."
    return panel(about, x, y, [*marks, *fault_marks(seen, x)], duration, count, height="10rem")


def token_bins(results: Sequence[TrialResult], seen: History, x: Scale) -> list[JSON]:
    """`{bin, useful, wasted, trials}` of those of `MAX_BINS` stretches in which a trial ended."""
    bins: dict[int, JSON] = {}
    for r in results:
        life = seen.lives.get(r.trial_id)
        if life is None or life.ended is None:
            continue
        where = min(int(x.at(life.ended - seen.began) * MAX_BINS / SIZE), MAX_BINS - 1)
        each = bins.setdefault(where, {"bin": where, "useful": 0, "wasted": 0, "trials": 0})
        each["useful"] += r.tokens_generated - r.tokens_wasted
        each["wasted"] += r.tokens_wasted
        each["trials"] += 1
    return [bins[where] for where in sorted(bins)]
