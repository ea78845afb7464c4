"""Whether what a run says of itself agrees: its events alone, its trials' lines, its summary and its counters.

Owns the comparison. Pure. Counters are those of the process that ended the run, and begin anew with a supervisor that is started
again: then they say nothing of the whole, and are left out with the reason. What a process had not told when it was lost is known to
nobody: that is no disagreement, and it is never said that nothing is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout_ft.telemetry.account import SUMS, Account
from rollout_ft.telemetry.words import counted
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

_COUNTERS = {name: f"rollout_ft/{name}" for name in ("tokens_generated", "tokens_reused", "tokens_wasted")}


@dataclass(frozen=True, slots=True)
class Audit:
    """`figures`: of each what events, trials.jsonl, summary.json and counters say; None where one does not say it. `faults`: what was
    lost and restarted, and what became of takeovers. `wrong`: sentences; empty when all agree and nothing is left open. `notes`: what
    is left out, and what nobody knows."""

    figures: dict[str, dict[str, int | None]]
    faults: dict[str, dict[str, int]]
    wrong: list[str]
    notes: list[str]

    def line(self) -> JSON:
        return {"agrees": not self.wrong, "figures": self.figures, "faults": self.faults, "wrong": self.wrong, "notes": self.notes}


def audit(told: Account, results: Sequence[TrialResult], summary: Mapping[str, object], counters: Mapping[str, float] | None) -> Audit:
    """Of a run that is over, or of as much of one as has ended."""
    played = [result for result in results if result.recorded]
    why_not = _not_counted(told, counters)
    counters = None if why_not else counters
    figures: dict[str, dict[str, int | None]] = {
        "trials": _figure(told.outcomes.total(), len(played), summary, "trials", len(results) - len(played), counters, "trials_finished")
    }
    outcomes = Counter(result.outcome for result in played)
    for outcome in sorted(outcomes | told.outcomes):
        finished = None if counters is None else round(counters[f"rollout_ft/trials_finished/{outcome}"])
        figures[outcome] = {"events": told.outcomes[outcome], "trials": outcomes[outcome], "summary": None, "counters": finished}
    for name in SUMS:
        lines = sum(getattr(result, name) for result in played)
        figures[name] = _figure(told.sums[name], lines, summary, name, 0, counters, name)
    figures["restarts"] = _restarts(told, figures, counters)
    wrong = [f"{name}: {_said(said)}" for name, said in figures.items() if not _agrees(name, said, told)]
    recoveries = {how: count for how, count in told.recoveries.items() if count}
    faults = {"lost": dict(told.lost), "restarts": dict(told.restarts), "takeovers": recoveries, "wasted": dict(told.wasted)}
    return Audit(figures, faults, wrong + _open(told), [*([why_not] if why_not else []), *_unknown(told, figures["restarts"])])


def _figure(
    events: int, lines: int, summary: Mapping[str, object], key: str, apart: int, counters: Mapping[str, float] | None, counter: str
) -> dict[str, int | None]:  # fmt: skip
    """`apart`: trials with a line that were never played, of which the summary counts all."""
    total = summary.get(key)
    count = counters.get(_COUNTERS.get(key, f"rollout_ft/{counter}")) if counters else None
    return {
        "events": events, "trials": lines, "summary": total - apart if isinstance(total, int) else None,
        "counters": None if count is None else round(count),
    }  # fmt: skip


def _restarts(
    told: Account, figures: Mapping[str, Mapping[str, int | None]], counters: Mapping[str, float] | None
) -> dict[str, int | None]:
    """Of the trials that have an end."""
    found: dict[str, int | None] = {}
    for who, attempts in figures["attempts"].items():
        trials = figures["trials"][who]
        found[who] = None if attempts is None or trials is None else attempts - trials
    running = sum(attempt - 1 for attempt in told.running.values())
    again = counters.get("rollout_ft/attempts_restarted") if counters else None
    return found | {"events": told.restarts.total() - running, "counters": None if again is None else round(again) - running}


def _agrees(name: str, said: Mapping[str, int | None], told: Account) -> bool:
    counts = {who: count for who, count in said.items() if count is not None}
    if name == "restarts" and _lost(told) and counts["events"] <= counts["trials"]:
        del counts["events"]  # those that are not there are a note
    return len(set(counts.values())) < 2


def _lost(told: Account) -> bool:
    """Whether a process that told events was."""
    return bool(told.events["run.resumed"] or told.events["supervisor.rebuilt"])


def _unknown(told: Account, restarts: Mapping[str, int | None]) -> list[str]:
    """What nobody can say any more."""
    made = [f"{start} has no event: it ended with the supervisor that saw it" for start in told.untold]
    if _lost(told):
        made.append("of the last second before a supervisor or the run's process was lost events may be missing, and so may faults")
        if missing := max(0, (restarts["trials"] or 0) - (restarts["events"] or 0)):
            made.append(f"{counted(missing, 'restart')} of attempts {'has' if missing == 1 else 'have'} no event")
    if told.events["run.resumed"]:
        made.append("what turns had sampled that were in flight when a process ended is counted by nobody: tokens_wasted is what is known")
    return made


def _open(told: Account) -> list[str]:
    """What began, and of which no event tells how it ended."""
    return [
        *([f"{missing:,} events are missing: their numbers are left out"] if (missing := max(told.missing, told.missed)) else []),
        *(f"trial {trial} was opened, and has no end" for trial in told.running),
        *(f"session {session} was taken over, and neither went on, started again nor ended" for session in told.moving),
    ]


def _not_counted(told: Account, counters: Mapping[str, float] | None) -> str:
    if not counters:
        return "counters are left out: nothing was counted (telemetry.metrics), or the process that ended the run could not ask"
    if told.events["run.resumed"]:
        return "counters are left out: several processes ran the run, and each began its own"
    return "counters are left out: a supervisor that was started again began its own" if told.events["supervisor.rebuilt"] else ""


def _said(said: Mapping[str, int | None]) -> str:
    return ", ".join(f"{who} {count:,}" for who, count in said.items() if count is not None)
