"""`report.html`: what became of a run, or of several beside each other, on one page that needs nothing else.

Owns the page: its order and its links. Pure. It has no script and loads nothing, which its own policy says too; whatever a
run wrote is escaped. A section is a function of the runs beside each other, and is left out where it has nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files

from rollout_ft.telemetry.report.beside import Beside, Reported
from rollout_ft.telemetry.report.course import over_time, recovery, tokens
from rollout_ft.telemetry.report.faults import with_and_without
from rollout_ft.telemetry.report.groups import groups, replays
from rollout_ft.telemetry.report.lead import advice, lead
from rollout_ft.telemetry.report.trials import trials, worst

__all__ = ["Reported", "report"]

SECTIONS = {
    "advice": "What to do", "time": "Trials over time", "recovery": "Recoveries", "tokens": "Tokens", "faults": "With and without faults",
    "worst": "The worst trials", "groups": "Groups", "replays": "Replays that left their record", "trials": "All trials",
}  # fmt: skip
_DRAW: dict[str, Callable[[Beside], str]] = {
    "advice": advice, "time": over_time, "recovery": recovery, "tokens": tokens, "faults": with_and_without, "worst": worst,
    "groups": groups, "replays": replays, "trials": trials,
}  # fmt: skip


def report(runs: Sequence[Reported], now: float) -> str:
    """The page; the first run is what the others are compared with. `now`: wall clock."""
    beside = Beside(runs)
    drawn = {key: body for key, draw in _DRAW.items() if (body := draw(beside))}
    nav = "".join(f'<a href="#{key}">{SECTIONS[key]}</a>' for key in drawn)
    sections = "".join(f'<section id="{key}"><h2>{SECTIONS[key]}</h2>{body}</section>' for key, body in drawn.items())
    made = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    leads = beside.each(lead, "h2")
    title = " beside ".join(run.name for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)} – rollout_ft</title><style>{_style()}</style></head><body>'
        f'<header><p class="of">rollout_ft report, {made}</p><h1>{escape(title)}</h1>{leads}</header>'
        f'<nav aria-label="sections">{nav}</nav><main>{sections}</main></body></html>\n'
    )  # fmt: skip


def _style() -> str:
    return files("rollout_ft.telemetry").joinpath("report.css").read_text()
