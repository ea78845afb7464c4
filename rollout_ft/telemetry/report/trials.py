"""The worst trials moment by moment, and all trials in a table.

Owns the columns, and the places that lines of other sections lead to.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from rollout_ft.telemetry.figures import WORST
from rollout_ft.telemetry.html import MAX_LISTED, figure, more, spaced, table
from rollout_ft.telemetry.moments import Moment
from rollout_ft.telemetry.report.beside import Beside, Reported, anchor
from rollout_ft.telemetry.words import duration
from rollout_ft.types import JSON

COLUMNS = (
    "trial_id", "outcome", "reward", "attempts", "turns", "faults_survived", "tokens_generated", "tokens_reused", "tokens_wasted",
    "seconds", "divergences",
)  # fmt: skip


def worst(beside: Beside) -> str:
    def draw(run: Reported) -> str:
        number = beside.runs.index(run)
        head = ("trial", "why", "attempts", "generated", "wasted", "longest wait", "seconds")
        rows = [_worst_row(anchor(number, each["trial_id"], run), each) for each in run.figures["worst"]]
        told = "".join(_timeline(anchor(number, trial_id, run), trial_id, moments) for trial_id, moments in run.timelines.items())
        return table(head, rows, escaped=True, text=2) + told if rows else ""

    drawn = beside.each(draw)
    about = (
        f"At most {WORST}: in turn the next of those that were lost, took most attempts, wasted most tokens, waited longest for a recovery."
    )
    return f'<p class="note">{about}</p>{drawn}' if drawn else ""


def _worst_row(anchor: str, each: JSON) -> list[str]:
    spent = [f"{each[key]:,}" for key in ("attempts", "tokens_generated", "tokens_wasted")]
    said = [f'<a href="#{anchor}">{escape(each["trial_id"])}</a>', escape(each["why"])]
    return [*said, *spent, duration(each["stalled_s"]), duration(each["seconds"])]


def _timeline(anchor: str, trial_id: str, moments: Sequence[Moment]) -> str:
    if not moments:
        return f'<article id="{anchor}"><h3>{escape(trial_id)}</h3><p class="note">Nothing is left of it but its result.</p></article>'
    began = moments[0].time
    rows = "".join(
        f'<tr class="{m.kind}{" bad" if m.bad else ""}"><td>+{m.time - began:.2f} s</td><td>{m.kind}</td><td>{escape(m.text)}</td></tr>'
        for m in moments
    )
    at = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if began else ""
    return (
        f'<article id="{anchor}"><h3>{escape(trial_id)} <span class="note">from {at}</span></h3>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="moments of {escape(trial_id)}">'
        f'<table class="moments"><thead><tr><th>after</th><th>what</th><th>told</th></tr></thead><tbody>{rows}</tbody>'
        f"</table></div></article>"
    )  # fmt: skip


def trials(beside: Beside) -> str:
    def draw(run: Reported) -> str:
        ordered = sorted(run.results, key=lambda r: (not r.lost, -r.attempts, r.trial_id))
        rows = [[figure(r.line()[name]) for name in COLUMNS] for r in ordered[:MAX_LISTED]]
        return table([spaced(name) for name in COLUMNS], rows, text=2) + more(ordered, "trials.jsonl")

    return "".join(f"<h3>{escape(run.name)}</h3>{draw(run)}" if len(beside.runs) > 1 else draw(run) for run in beside.runs)
