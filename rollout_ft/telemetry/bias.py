"""Whether trials that met faults differ from those that did not, and what is missing where trials were lost.

Owns the comparison. Pure. A difference comes with its 95 % interval (Welch's standard error, normal quantile): one that
contains 0 is none that was seen, which is not one that is not there. Lost trials (`infra_exhausted`) have no reward and no
length of their own: what their loss does to a batch is read from the same trials of a run that kept them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rollout_ft.trial.groups import GroupResult, Status
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome

QUANTITIES: dict[str, Callable[[TrialResult], float | None]] = {
    "tokens": lambda r: r.tokens_generated - r.tokens_wasted,
    "turns": lambda r: r.turns,
    "seconds": lambda r: r.seconds,
    "reward": lambda r: r.reward,
}
"""Of one trial; `tokens` are those in its trajectory."""
HEAD = ("", "trials", *QUANTITIES)
_Z = 1.96


def within(results: Iterable[TrialResult]) -> JSON:
    """One run: `{met, clean, lost, difference}`, trials that survived a fault, those that met none, the first less the second."""
    every = list(results)
    kept = [r for r in every if not _lost(r)]
    met, clean = [r for r in kept if r.faults_survived], [r for r in kept if not r.faults_survived]
    return {"met": _means(met), "clean": _means(clean), "lost": len(every) - len(kept), "difference": _apart(met, clean)}


def between(reference: Iterable[TrialResult], other: Iterable[TrialResult]) -> JSON:
    """Two runs of the same trials.

    `reference, other, difference`: the trials that both kept, pair by pair; `lost`: those that only the reference kept, as
    they are there; `missing`: these less the ones that both kept, which is what the other's batch lacks; `elsewhere`: how
    many trials are in one of the runs alone."""
    theirs, ours = {r.trial_id: r for r in reference}, {r.trial_id: r for r in other}
    same = theirs.keys() & ours.keys()
    both = sorted(i for i in same if not _lost(theirs[i]) and not _lost(ours[i]))
    lost = [theirs[i] for i in sorted(same) if not _lost(theirs[i]) and _lost(ours[i])]
    there, here = [theirs[i] for i in both], [ours[i] for i in both]
    return {
        "reference": _means(there), "other": _means(here), "difference": _pairs(here, there),
        "lost": _means(lost), "missing": _apart(lost, there), "elsewhere": len(theirs.keys() ^ ours.keys()),
    }  # fmt: skip


def grouped(results: Iterable[TrialResult], groups: Sequence[GroupResult]) -> JSON:
    """`{groups, counted, left_out, difference}`: how many groups have which status; trials that count in theirs, those that
    ended as well and do not, as their group was dropped, and the second less the first: what dropping does to the batch."""
    kept = [r for r in results if not r.lost]
    counting = {trial_id for group in groups for trial_id in group.trials}
    dropped = {group.group_id for group in groups if group.status == Status.DROPPED}
    counted, left_out = [r for r in kept if r.trial_id in counting], [r for r in kept if r.group_id in dropped]
    return {
        "groups": dict(Counter(group.status for group in groups)), "counted": _means(counted), "left_out": _means(left_out),
        "difference": _apart(left_out, counted),
    }  # fmt: skip


def rows_grouped(figures: JSON) -> list[list[str]]:
    """For people, under `HEAD`."""
    return [_row("count", figures["counted"]), _row("group dropped", figures["left_out"]), _gap("difference", figures["difference"])]


def rows_within(figures: JSON) -> list[list[str]]:
    """For people, under `HEAD`."""
    return [_row("met a fault", figures["met"]), _row("met none", figures["clean"]), _gap("difference", figures["difference"])]


def rows_between(figures: JSON, reference: str, other: str) -> list[list[str]]:
    """For people, under `HEAD`; both runs by their names."""
    rows = [_row(reference, figures["reference"]), _row(other, figures["other"]), _gap("difference", figures["difference"])]
    if figures["lost"]["trials"]:
        rows += [_row(f"lost by {other}", figures["lost"]), _gap("less those kept", figures["missing"])]
    return rows


def _lost(r: TrialResult) -> bool:
    return r.outcome == Outcome.INFRA_EXHAUSTED


def _means(results: Sequence[TrialResult]) -> JSON:
    columns = {name: _values(results, of) for name, of in QUANTITIES.items()}
    return {"trials": len(results)} | {name: float(values.mean()) if len(values) else None for name, values in columns.items()}


def _values(results: Sequence[TrialResult], of: Callable[[TrialResult], float | None]) -> np.ndarray:
    return np.array([value for r in results if (value := of(r)) is not None], dtype=np.float64)


def _apart(some: Sequence[TrialResult], others: Sequence[TrialResult]) -> JSON:
    """Of two groups: the difference of their means, and its interval."""
    found: JSON = {}
    for name, of in QUANTITIES.items():
        a, b = _values(some, of), _values(others, of)
        enough = len(a) > 1 and len(b) > 1
        error = float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))) if enough else None
        found[name] = _interval(float(a.mean() - b.mean()) if len(a) and len(b) else None, error)
    return found


def _pairs(some: Sequence[TrialResult], others: Sequence[TrialResult]) -> JSON:
    """Of the same trials in two runs: the mean of their differences, and its interval."""
    found: JSON = {}
    for name, of in QUANTITIES.items():
        pairs = [(a, b) for x, y in zip(some, others, strict=True) if (a := of(x)) is not None and (b := of(y)) is not None]
        apart = np.array([a - b for a, b in pairs], dtype=np.float64)
        error = float(np.sqrt(apart.var(ddof=1) / len(apart))) if len(apart) > 1 else None
        found[name] = _interval(float(apart.mean()) if len(apart) else None, error)
    return found


def _interval(mean: float | None, error: float | None) -> JSON:
    low, high = (None, None) if mean is None or error is None else (mean - _Z * error, mean + _Z * error)
    return {"mean": mean, "low": low, "high": high}


def _row(name: str, means: JSON) -> list[str]:
    return [name, f"{means['trials']:,}", *(_shown(means[q]) for q in QUANTITIES)]


def _gap(name: str, difference: JSON) -> list[str]:
    return [name, "", *(_shown_gap(difference[q]) for q in QUANTITIES)]


def _shown_gap(gap: JSON) -> str:
    return _shown(gap["mean"]) + (f" ({_shown(gap['low'])} … {_shown(gap['high'])})" if gap["low"] is not None else "")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"
