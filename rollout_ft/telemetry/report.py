"""`report.html`: a run's results on one page that needs nothing else.

Owns the page. Everything on it is in `summary.json` and `trials.jsonl` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rollout_ft.telemetry.bias import HEAD, grouped, rows_grouped, rows_within, within
from rollout_ft.telemetry.divergences import HEAD as DIVERGED
from rollout_ft.telemetry.divergences import rows_diverged
from rollout_ft.trial.groups import GroupResult
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
    "divergences",
)


def report(
    summary: JSON, results: Sequence[TrialResult], diverged: Sequence[JSON] = (), groups: Sequence[GroupResult] = ()
) -> str:  # fmt: skip
    """The page; trials that needed most attempts first. `diverged`: where replays left their record."""
    totals = "".join(f"<div><dt>{escape(_words(k))}</dt><dd>{escape(_shown(v))}</dd></div>" for k, v in summary.items())
    ordered = sorted(results, key=lambda r: (-r.attempts, r.trial_id))
    faults = [_row(cells) for cells in rows_within(within(results))]
    trials = [_row([_shown(r.line()[name]) for name in _COLUMNS], lost=r.reward is None) for r in ordered]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>rollout_ft report</title><style>{_STYLE}</style>'
        f"<h1>rollout_ft report</h1><dl>{totals}</dl>"
        f"<h2>Faults</h2><p>Means; the difference with its 95 % interval.</p>{_table(HEAD, faults)}"
        f"{_groups(results, groups) if groups else ''}"
        f"{_replays(diverged)}"
        f"<h2>Trials</h2>{_table([_words(name) for name in _COLUMNS], trials)}</html>\n"
    )


def _groups(results: Sequence[TrialResult], groups: Sequence[GroupResult]) -> str:
    means = [_row(cells) for cells in rows_grouped(grouped(results, groups))]
    losers = [_row([g.group_id, g.status, _shown(len(g.trials)), ", ".join(g.lost)], lost=not g.trials) for g in groups if g.lost]
    return (
        f"<h2>Groups</h2><p>Trials that count in their group, and those that do not.</p>{_table(HEAD, means)}"
        f"{_table(('group', 'status', 'trials that count', 'lost'), losers) if losers else ''}"
    )


def _replays(diverged: Sequence[JSON]) -> str:
    if not diverged:
        return ""
    rows = [_row(cells) for cells in rows_diverged(diverged)]
    return f"<h2>Replays that left their record</h2><p>The first difference of each attempt.</p>{_table(DIVERGED, rows)}"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(cells: Sequence[str], *, lost: bool = False) -> str:
    marked = ' class="lost"' if lost else ""
    return f"<tr{marked}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


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
