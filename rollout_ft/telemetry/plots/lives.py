"""Each trial as a line from its opening to its end.

Owns which are shown: of many those that took longest. Outcomes have their colours here.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout_ft.telemetry.history import FAULTS, History, Life
from rollout_ft.telemetry.plots.faultmarks import KEYS
from rollout_ft.telemetry.svg import SIZE, Scale, dot, legend, line, panel
from rollout_ft.telemetry.words import counted, duration
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import Outcome

MAX_ROWS = 100
OUTCOMES: dict[str, str] = {
    Outcome.COMPLETED.value: "o-completed", Outcome.TRUNCATED.value: "o-truncated", Outcome.AGENT_FAILED.value: "o-agent",
    Outcome.ENV_FAILED.value: "o-env", Outcome.INFRA_EXHAUSTED.value: "o-infra", Outcome.CANCELLED.value: "o-cancelled",
}  # fmt: skip


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
