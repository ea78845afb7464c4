"""A run in numbers: its totals, what befell it, how long recoveries took, which trials are the worst.

Owns what is counted how. Pure. Totals are sums over the lines of `trials.jsonl`, so that report and `summary.json` cannot differ.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rollout_ft.telemetry.explanations import Explanation, explain
from rollout_ft.telemetry.history import FAULTS, History
from rollout_ft.telemetry.words import counted
from rollout_ft.trial.groups import LOST
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome

WORST = 10
QUANTILES = (50, 90, 99)
_MEANT = frozenset({Outcome.COMPLETED, Outcome.CANCELLED})


def totals(results: Sequence[TrialResult]) -> JSON:
    return {
        "trials": len(results), "outcomes": dict(Counter(r.outcome for r in results)),
        "attempts": sum(r.attempts for r in results), "turns": sum(r.turns for r in results),
        "tokens_generated": sum(r.tokens_generated for r in results), "tokens_reused": sum(r.tokens_reused for r in results),
        "tokens_wasted": sum(r.tokens_wasted for r in results),
    }  # fmt: skip


def figures(results: Sequence[TrialResult], seen: History) -> JSON:
    """`{totals, faults, recoveries, wasted_by, worst}`. `faults`: `{event: {count, first_s, last_s}}`, in seconds of the run;
    `recoveries`: `{reason: {count, p50, p90, p99, max}}`, in seconds; `wasted_by`: tokens by why, of the trials whose end says so."""
    stalled_s = seen.stalled_s
    chosen = [{"why": why, "stalled_s": round(stalled_s.get(r.trial_id, 0.0), 3), **r.line()} for r, why in worst(results, stalled_s)]
    return {
        "totals": totals(results),
        "faults": _faults(seen),
        "recoveries": _recoveries(seen),
        "wasted_by": _wasted(results, seen),
        "worst": chosen,
    }


def fell_short(outcomes: Mapping[str, int]) -> str:
    """`17 agent_failed, 2 truncated`: trials that were not lost, and have no reward."""
    return ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items() if outcome not in LOST | _MEANT)


def _faults(seen: History) -> JSON:
    times: dict[str, list[float]] = {kind: [] for kind in FAULTS}
    for fault in seen.faults:
        times[fault.kind].append(fault.time - seen.began)
    return {
        kind: {"count": len(at), "first_s": round(at[0], 3), "last_s": round(at[-1], 3)} for kind, at in times.items() if at
    }  # fmt: skip


def _recoveries(seen: History) -> JSON:
    by_reason: dict[str, list[float]] = defaultdict(list)
    for recovery in seen.recoveries:
        by_reason[recovery.reason].append(recovery.seconds)
    return {
        reason: {"count": len(took), **{f"p{q}": float(np.percentile(took, q)) for q in QUANTILES}, "max": max(took)}
        for reason, took in sorted(by_reason.items())
    }


def _wasted(results: Iterable[TrialResult], seen: History) -> dict[str, int]:
    by_why = sum((seen.wasted[r.trial_id] for r in results if r.trial_id in seen.wasted), Counter[str]())
    return dict(by_why.most_common())


def worst(results: Iterable[TrialResult], stalled_s: dict[str, float], most: int = WORST) -> list[tuple[TrialResult, str]]:
    """At most `most` trials, and why each is among them: in turn the next of those that were lost, that took most attempts, that
    wasted most tokens, that waited longest for a recovery. A trial of which none of this holds is none of them."""
    every = list(results)

    def ranked(badness: dict[str, float]) -> list[TrialResult]:
        there = [r for r in every if badness[r.trial_id] > 0]
        return sorted(there, key=lambda r: (-badness[r.trial_id], r.trial_id))

    rankings = [
        ranked({r.trial_id: r.attempts + 1.0 if r.lost else 0.0 for r in every}),
        ranked({r.trial_id: r.attempts - 1.0 for r in every}),
        ranked({r.trial_id: float(r.tokens_wasted) for r in every}),
        ranked({r.trial_id: stalled_s.get(r.trial_id, 0.0) for r in every}),
    ]
    chosen: dict[str, TrialResult] = {}
    while len(chosen) < most and any(rankings):
        for ranking in rankings:
            while ranking and ranking[0].trial_id in chosen:
                ranking.pop(0)
            if ranking and len(chosen) < most:
                chosen[ranking[0].trial_id] = ranking[0]
    order = sorted(chosen.values(), key=lambda r: (not r.lost, -r.attempts, -r.tokens_wasted, -stalled_s.get(r.trial_id, 0.0), r.trial_id))
    return [(r, _why(r, stalled_s.get(r.trial_id, 0.0))) for r in order]


def _why(r: TrialResult, stalled_s: float) -> str:
    said = (
        f"lost ({r.outcome})" if r.lost else "",
        counted(r.attempts, "attempt") if r.attempts > 1 else "",
        f"{counted(r.tokens_wasted, 'token')} wasted" if r.tokens_wasted else "",
        f"waited {stalled_s:.3g} s for its next token" if stalled_s else "",
    )
    return ", ".join(filter(None, said))


@dataclass(frozen=True, slots=True)
class Advice:
    """What is known of something that was seen `count` times; `last` is what was said when it was seen last."""

    about: Explanation
    count: int
    last: str


def advice(results: Iterable[TrialResult], seen: History) -> list[Advice]:
    """On the outcomes of trials that nobody meant, and on what engines were lost to; what was seen most often comes first."""
    said = [(r.outcome, f"{r.trial_id}: {r.cause}") for r in results if r.outcome not in _MEANT]
    said += [(fault.why, f"{fault.who}: {fault.why}") for fault in seen.faults if fault.kind == "engine.dead"]
    counts, last, about = Counter[str](), dict[str, str](), dict[str, Explanation]()
    for code, words in said:
        known = explain(code)
        if known is not None:
            counts[known.code] += 1
            last[known.code], about[known.code] = words, known
    return [Advice(about[code], count, last[code]) for code, count in counts.most_common()]
