"""`report.html`: a run's results on one page that needs nothing else.

Owns the page. Everything on it is in `summary.json` and `trials.jsonl` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right }
th:first-child, td:first-child, td.text, th.text { text-align: left } .lost { color: #a40e26; font-weight: 600 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
dt { color: #57606a } dd { margin: 0; font-size: 1.4rem }
"""
_COLUMNS = (
    "trial_id",
    "outcome",
    "reward",
    "attempts",
    "turns",
    "faults_survived",
    "tokens_generated",
    "tokens_reused",
    "tokens_wasted",
    "seconds",
)


def report(summary: JSON, results: Sequence[TrialResult]) -> str:
    """The page; trials that needed most attempts first."""
    totals = "".join(f"<div><dt>{escape(_words(k))}</dt><dd>{escape(_shown(v))}</dd></div>" for k, v in summary.items())
    head = "".join(f"<th>{escape(_words(name))}</th>" for name in _COLUMNS)
    ordered = sorted(results, key=lambda r: (-r.attempts, r.trial_id))
    rows = "".join(_row(result) for result in ordered)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>rollout_ft report</title><style>{_STYLE}</style>'
        f"<h1>rollout_ft report</h1><dl>{totals}</dl><h2>Trials</h2>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></html>\n"
    )


def _row(result: TrialResult) -> str:
    line = result.line()
    lost = ' class="lost"' if result.reward is None else ""
    return f"<tr{lost}>" + "".join(f"<td>{escape(_shown(line[name]))}</td>" for name in _COLUMNS) + "</tr>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float):
        return f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
