"""Runs beside each other: what each has, and the scales that they have in common.

Owns the scales, since what is drawn beside each other is drawn to one, and where on the page a trial is told of. Knows no section.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from rollout_ft.telemetry.history import History
from rollout_ft.telemetry.moments import Moment
from rollout_ft.telemetry.plots.recoveries import recovery_scale
from rollout_ft.telemetry.plots.running import running, time_scale
from rollout_ft.telemetry.plots.tokens import token_bins
from rollout_ft.telemetry.svg import Scale, up_to
from rollout_ft.trial.groups import GroupResult
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON


@dataclass(frozen=True, slots=True)
class Reported:
    """One run. `summary` are the totals of its trials and what `summary.json` has beside; `figures` those of `telemetry.figures`;
    `timelines` of its worst trials."""

    name: str
    results: Sequence[TrialResult]
    seen: History
    summary: JSON
    figures: JSON
    groups: Sequence[GroupResult] = ()
    diverged: Sequence[JSON] = ()
    timelines: dict[str, list[Moment]] = field(default_factory=dict[str, list[Moment]])


class Beside:
    """Runs with the scales that they have in common."""

    def __init__(self, runs: Sequence[Reported]):
        self.runs = runs
        self.time = time_scale(run.seen for run in runs)
        self.recovery = recovery_scale([run.seen for run in runs])
        self.bins = {run.name: token_bins(run.results, run.seen, self.time) for run in runs}
        self.most_running = max((n for run in runs for _, n in running(run.seen, self.time.high)), default=0)
        self.most_tokens = max((each["useful"] + each["wasted"] for bins in self.bins.values() for each in bins), default=0)

    def each(self, draw: Callable[[Reported], str], heading: str = "h3") -> str:
        """Of every run, beside each other where there are several and room."""
        shown = [(run.name, body) for run in self.runs if (body := draw(run))]
        if len(self.runs) == 1:
            return "".join(body for _, body in shown)
        columns = [f'<div><{heading} class="run">{escape(name)}</{heading}>{body}</div>' for name, body in shown]
        return f'<div class="beside">{"".join(columns)}</div>' if shown else ""

    def over(self, of: Callable[[TrialResult], float | None]) -> Scale:
        return up_to([value for run in self.runs for r in run.results if not r.lost and (value := of(r)) is not None])


def anchor(run: int, trial_id: str, of: Reported) -> str:
    return f"run-{run}-{list(of.timelines).index(trial_id)}"
