"""How trials that met faults differ from those that met none, and a run from the first.

Owns which figures are compared. Trials that were lost have none of them.
"""

from __future__ import annotations

from html import escape

from rollout_ft.telemetry.bias import HEAD, between, rows_between, rows_within, within
from rollout_ft.telemetry.html import table
from rollout_ft.telemetry.plots.distribution import DISTRIBUTION_KEY, distribution
from rollout_ft.telemetry.report.beside import Beside, Reported
from rollout_ft.telemetry.words import count
from rollout_ft.trial.runner import TrialResult


def with_and_without(beside: Beside) -> str:
    tokens, reward = beside.over(_useful), beside.over(_reward)

    def draw(run: Reported) -> str:
        drawn = distribution(run.results, _useful, tokens, count, "Tokens of a trajectory")
        if any(r.reward is not None for r in run.results):
            drawn += distribution(run.results, _reward, reward, _decimal, "Rewards")
        return drawn + DISTRIBUTION_KEY + table(HEAD, rows_within(within(run.results)))

    reference, *others = beside.runs
    compared = "".join(
        f"<h3>{escape(run.name)} beside {escape(reference.name)}, the same trials</h3>"
        + table(HEAD, rows_between(between(reference.results, run.results), reference.name, run.name))
        for run in others
    )
    return beside.each(draw) + '<p class="note">Means; the difference with its 95 % interval.</p>' + compared


def _useful(r: TrialResult) -> float | None:
    return r.tokens_generated - r.tokens_wasted


def _reward(r: TrialResult) -> float | None:
    return r.reward


def _decimal(value: float) -> str:
    return f"{value:.3g}"
