"""What a run's report draws: trials over time with their faults, recoveries, tokens, lengths and rewards.

Owns what is drawn where, and how much of it: of 50,000 trials and as many faults a plot has a bounded number of marks, each of
which says for how many it stands. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from rollout_ft.telemetry.history import FAULTS, Fault, History, Life
from rollout_ft.telemetry.svg import SIZE, Scale, area, bar, box, decades, dot, legend, line, panel, rule, up_to
from rollout_ft.telemetry.words import counted
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome

MAX_ROWS, MAX_BINS, MAX_MARKS, MAX_POINTS = 100, 60, 200, 300
MANY_MARKS, SHORT = 40, 120.0
LEAST_S = 0.001
KEYS = {
    "engine.dead": "f-engine", "gateway.lost": "f-gateway", "store.lost": "f-store", "store.data_lost": "f-store",
    "supervisor.rebuilt": "f-supervisor", "trial.restarted": "f-restart", "run.resumed": "f-supervisor",
}  # fmt: skip
OUTCOMES: dict[str, str] = {
    Outcome.COMPLETED.value: "o-completed", Outcome.TRUNCATED.value: "o-truncated", Outcome.AGENT_FAILED.value: "o-agent",
    Outcome.ENV_FAILED.value: "o-env", Outcome.INFRA_EXHAUSTED.value: "o-infra", Outcome.CANCELLED.value: "o-cancelled",
}  # fmt: skip


_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0))


def duration(seconds: float) -> str:
    """`90 s`, `2.5 min`: from two of a unit on."""
    unit, length = next(((unit, length) for unit, length in _UNITS if abs(seconds) >= 2 * length), ("s", 1.0))
    return f"{seconds / length:.3g} {unit}"


def count(value: float) -> str:
    if value != int(value):
        return ""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"


def share(value: float) -> str:
    return f"{value:.0%}"


def time_scale(runs: Iterable[History]) -> Scale:
    """Of runs beside each other: the same for all, from the beginning of each."""
    length = max((seen.ended - seen.began for seen in runs), default=0.0) or 1.0
    return Scale(0.0, length, unit=next((unit for _, unit in _UNITS if length >= 2 * unit), 1.0))


# -- trials over time -------------------------------------------------------------------------------------------------


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


def fault_marks(seen: History, x: Scale) -> list[str]:
    """Those of a kind that are too near to be told apart are one mark; many are short, so that they hide nothing."""
    near: dict[tuple[str, int], list[Fault]] = defaultdict(list)
    for fault in seen.faults:
        near[fault.kind, round(x.at(fault.time - seen.began) * MAX_MARKS / SIZE)].append(fault)
    length = SIZE if sum(kind != "trial.restarted" for kind, _ in near) <= MANY_MARKS else SHORT
    marks: list[str] = []
    for (kind, _), faults in sorted(near.items(), key=lambda each: each[0][0] != "trial.restarted"):
        at = x.at(faults[0].time - seen.began)
        said = _said(kind, faults, seen)
        if kind == "trial.restarted":
            marks.append(dot(at, 25, KEYS[kind], said, len(faults)))
        else:
            marks.append(rule(at, KEYS[kind], said, len(faults), length=length))
    return marks


def _said(kind: str, faults: Sequence[Fault], seen: History) -> str:
    first = faults[0]
    more = f" and {len(faults) - 1:,} more" if len(faults) > 1 else ""
    about = f": {first.who}{more}{f' ({first.why})' if first.why else ''}" if first.who or first.why else more
    return f"{FAULTS[kind]} after {duration(first.time - seen.began)}{about}"


def each_trial(results: Sequence[TrialResult], seen: History, x: Scale, links: dict[str, str]) -> str:
    """A line for each trial from its opening to its end; of many, for those that took longest. `links`: to where one is told of."""
    by_id = {r.trial_id: r for r in results}
    lives = sorted((life.began, i, life) for i, life in seen.lives.items() if life.began is not None and i in by_id)
    if not lives:
        return ""
    took = {i: (seen.ended if life.ended is None else life.ended) - began for began, i, life in lives}
    longest = set(sorted(took, key=lambda i: (-took[i], i))[:MAX_ROWS])
    chosen = [each for each in lives if each[1] in longest]
    rows = [_row(by_id[i], life, seen, x, SIZE * (1 - (n + 0.5) / len(chosen)), links.get(i, "")) for n, (_, i, life) in enumerate(chosen)]
    shown = {by_id[i].outcome for _, i, _ in chosen}
    entries = [(kind, outcome) for outcome, kind in OUTCOMES.items() if outcome in shown]
    if any(life.restarts for _, _, life in chosen):
        entries.append((KEYS["trial.restarted"], FAULTS["trial.restarted"]))
    height = f"{max(4.0, 0.5 * min(len(chosen), 60)):g}rem"
    about = f"Each of {len(chosen):,} trials from its opening to its end."
    drawn = panel(about, x, Scale(0, 1), rows, duration, lambda _: "", height=height)
    note = f'<p class="note">The {len(chosen):,} of {len(lives):,} trials that took longest.</p>' if len(chosen) < len(lives) else ""
    return drawn + legend(entries) + note


def _row(r: TrialResult, life: Life, seen: History, x: Scale, y: float, link: str) -> str:
    began, ended = (x.at((at if at is not None else seen.ended) - seen.began) for at in (life.began, life.ended))
    said = f"{r.trial_id}: {r.outcome}, {counted(r.attempts, 'attempt')}, {duration(r.seconds)}"
    bar = line([(began, y), (max(ended, began + 1), y)], f"life {OUTCOMES.get(r.outcome, 'o-cancelled')}", said)
    dots = "".join(dot(x.at(t - seen.began), y, "f-restart", f"{r.trial_id}: attempt restarted") for t in life.restarts)
    return f'<a href="#{link}">{bar}{dots}</a>' if link else bar + dots


# -- how long recoveries took -----------------------------------------------------------------------------------------


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


# -- tokens -----------------------------------------------------------------------------------------------------------


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


# -- with and without faults ------------------------------------------------------------------------------------------


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


_KEY = {"series-1": "met a fault", "series-0": "met none"}
DISTRIBUTION_KEY = legend(_KEY.items())


def _outline(heights: np.ndarray, edges: np.ndarray, x: Scale, y: Scale) -> list[tuple[float, float]]:
    sides = [
        (x.at(float(edge)), y.at(float(h))) for left, right, h in zip(edges, edges[1:], heights, strict=False) for edge in (left, right)
    ]
    return [(sides[0][0], 0.0), *sides, (sides[-1][0], 0.0)]
