"""Faults as marks on an axis of time, whatever else is drawn there.

Owns their kinds and how many there are: those that are too near to be told apart are one mark.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rollout_ft.telemetry.history import FAULTS, Fault, History
from rollout_ft.telemetry.svg import SIZE, Scale, dot, rule
from rollout_ft.telemetry.words import duration

MAX_MARKS, MANY_MARKS, SHORT = 200, 40, 120.0
KEYS = {
    "engine.dead": "f-engine", "gateway.lost": "f-gateway", "store.lost": "f-store", "store.data_lost": "f-store",
    "supervisor.rebuilt": "f-supervisor", "trial.restarted": "f-restart", "run.resumed": "f-supervisor",
}  # fmt: skip


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
