"""Groups that lost trials, and replays that left their record.

Owns two tables. Runs without either have neither section.
"""

from __future__ import annotations

from rollout_ft.telemetry.bias import HEAD, grouped, rows_grouped
from rollout_ft.telemetry.divergences import HEAD as DIVERGED
from rollout_ft.telemetry.divergences import rows_diverged
from rollout_ft.telemetry.html import MAX_LISTED, more, table
from rollout_ft.telemetry.report.beside import Beside, Reported


def groups(beside: Beside) -> str:
    def draw(run: Reported) -> str:
        if not run.groups:
            return ""
        losers = [[g.group_id, g.status, f"{len(g.trials):,}", ", ".join(g.lost)] for g in run.groups if g.lost]
        listed = (
            table(("group", "status", "trials that count", "lost"), losers[:MAX_LISTED]) + more(losers, "groups.jsonl") if losers else ""
        )
        return table(HEAD, rows_grouped(grouped(run.results, run.groups))) + listed

    drawn = beside.each(draw)
    return f'<p class="note">Trials that count in their group, and those that do not.</p>{drawn}' if drawn else ""


def replays(beside: Beside) -> str:
    drawn = beside.each(lambda run: table(DIVERGED, rows_diverged(run.diverged), text=len(DIVERGED)) if run.diverged else "")
    return f'<p class="note">The first difference of each attempt.</p>{drawn}' if drawn else ""
