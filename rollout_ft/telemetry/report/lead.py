"""The beginning of the page: the run in a sentence, its totals, and what to do.

Owns the sentence. What is advised is the catalogue's.
"""

from __future__ import annotations

from html import escape

from rollout_ft.telemetry.figures import advice as advised
from rollout_ft.telemetry.figures import fell_short
from rollout_ft.telemetry.history import FOLLOWS
from rollout_ft.telemetry.html import figure, prose, spaced
from rollout_ft.telemetry.plots.lives import OUTCOMES
from rollout_ft.telemetry.report.beside import Beside, Reported
from rollout_ft.telemetry.svg import bar, legend
from rollout_ft.telemetry.words import counted, shortened
from rollout_ft.types import JSON

MAX_SAID = 300


def lead(run: Reported) -> str:
    """The run in a sentence, and its totals."""
    summary, lost, met = run.summary, sum(r.lost for r in run.results), run.figures["faults"]
    generated, wasted = summary["tokens_generated"], summary["tokens_wasted"]
    faults = sum(each["count"] for kind, each in met.items() if kind not in FOLLOWS)
    restarts = met.get("trial.restarted", {"count": 0})["count"]
    short = escape(fell_short(summary["outcomes"]))
    failed = f', <b class="bad">{short}</b>' if short else ""
    unfinished = f", <b>{summary['unfinished']:,} unfinished</b>" if summary.get("unfinished") else ""
    lead = (
        f'<b>{counted(summary["trials"], "trial")}</b>, <b class="{"bad" if lost else "" if short else "good"}">{lost:,} lost</b>'
        f"{failed}{unfinished}. "
        f"{counted(faults, 'fault')}, {counted(len(run.seen.recoveries), 'recovery', 'recoveries')}, {counted(restarts, 'restart')}. "
        f"{wasted:,} of {counted(generated, 'token')} {'known to be ' if run.seen.resumed else ''}wasted"
        f"{f' ({wasted / generated:.2%})' if generated else ''}."
    )
    tiles = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    tiles |= {f"groups {status}": n for status, n in summary.get("groups", {}).items()}
    shown = "".join(f"<div><dt>{escape(spaced(key))}</dt><dd>{escape(figure(value))}</dd></div>" for key, value in tiles.items())
    return f'<p class="lead">{lead}</p><dl>{shown}</dl>{_outcomes(summary)}'


def advice(beside: Beside) -> str:
    """What `rollout-ft explain` says of the outcomes and losses of these runs."""
    found = {run.name: {each.about.code: each for each in advised(run.results, run.seen)} for run in beside.runs}
    items: list[str] = []
    for code in dict.fromkeys(code for those in found.values() for code in those):
        met = {name: those[code] for name, those in found.items() if code in those}
        about = next(iter(met.values())).about
        often = ", ".join(f"{each.count:,}" + (f" in {name}" if len(found) > 1 else "") for name, each in met.items())
        last = shortened(next(reversed(met.values())).last, MAX_SAID)
        items.append(
            f'<li><b>{escape(code)}</b> <span class="note">{escape(often)}</span><br>{prose(about.meaning)} <b>{prose(about.remedy)}</b>'
            f'<br><span class="note">The last: {escape(last)}</span></li>'
        )
    return f'<ul class="advice">{"".join(items)}</ul>' if items else ""


def _outcomes(summary: JSON) -> str:
    parts = [(OUTCOMES.get(outcome, "o-cancelled"), n, f"{outcome}: {n:,}") for outcome, n in summary["outcomes"].items()]
    return bar(parts) + legend((kind, said) for kind, _, said in parts)
