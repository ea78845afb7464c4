"""`report.html`: what became of a run, or of several beside each other, on one page that needs nothing else.

Owns the page: its order, its tables, its links. Pure. It has no script and loads nothing, which its own policy says too; whatever a
run wrote is escaped. What is drawn is `telemetry.plots`'s, and every figure is in a table as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files

from rollout_ft.telemetry import plots
from rollout_ft.telemetry.bias import HEAD, between, grouped, rows_between, rows_grouped, rows_within, within
from rollout_ft.telemetry.divergences import HEAD as DIVERGED
from rollout_ft.telemetry.divergences import rows_diverged
from rollout_ft.telemetry.figures import QUANTILES, WORST, advice, fell_short
from rollout_ft.telemetry.history import FAULTS, FOLLOWS, History
from rollout_ft.telemetry.html import MAX_LISTED, figure, more, prose, spaced, table
from rollout_ft.telemetry.moments import Moment
from rollout_ft.telemetry.svg import Scale, bar, legend, up_to
from rollout_ft.telemetry.words import counted, shortened
from rollout_ft.trial.groups import GroupResult
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

MAX_SAID = 300
COLUMNS = (
    "trial_id", "outcome", "reward", "attempts", "turns", "faults_survived", "tokens_generated", "tokens_reused", "tokens_wasted",
    "seconds", "divergences",
)  # fmt: skip
SECTIONS = {
    "advice": "What to do", "time": "Trials over time", "recovery": "Recoveries", "tokens": "Tokens", "faults": "With and without faults",
    "worst": "The worst trials", "groups": "Groups", "replays": "Replays that left their record", "trials": "All trials",
}  # fmt: skip


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


def report(runs: Sequence[Reported], now: float) -> str:
    """The page; the first run is what the others are compared with. `now`: wall clock."""
    beside = _Beside(runs)
    drawn = {key: body for key, draw in _DRAW.items() if (body := draw(beside))}
    nav = "".join(f'<a href="#{key}">{SECTIONS[key]}</a>' for key in drawn)
    sections = "".join(f'<section id="{key}"><h2>{SECTIONS[key]}</h2>{body}</section>' for key, body in drawn.items())
    made = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    lead = beside.each(_lead, "h2")
    title = " beside ".join(run.name for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)} – rollout_ft</title><style>{_style()}</style></head><body>'
        f'<header><p class="of">rollout_ft report, {made}</p><h1>{escape(title)}</h1>{lead}</header>'
        f'<nav aria-label="sections">{nav}</nav><main>{sections}</main></body></html>\n'
    )  # fmt: skip


def _style() -> str:
    return files("rollout_ft.telemetry").joinpath("report.css").read_text()


class _Beside:
    """Runs with the scales that they have in common."""

    def __init__(self, runs: Sequence[Reported]):
        self.runs = runs
        self.time = plots.time_scale(run.seen for run in runs)
        self.recovery = plots.recovery_scale([run.seen for run in runs])
        self.bins = {run.name: plots.token_bins(run.results, run.seen, self.time) for run in runs}
        self.most_running = max((n for run in runs for _, n in plots.running(run.seen, self.time.high)), default=0)
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


# -- sections ---------------------------------------------------------------------------------------------------------


def _lead(run: Reported) -> str:
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
        f"{wasted:,} of {counted(generated, 'token')} wasted{f' ({wasted / generated:.2%})' if generated else ''}."
    )
    tiles = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    tiles |= {f"groups {status}": n for status, n in summary.get("groups", {}).items()}
    shown = "".join(f"<div><dt>{escape(spaced(key))}</dt><dd>{escape(figure(value))}</dd></div>" for key, value in tiles.items())
    return f'<p class="lead">{lead}</p><dl>{shown}</dl>{_outcomes(summary)}'


def _advice(beside: _Beside) -> str:
    """What `rollout-ft explain` says of the outcomes and losses of these runs."""
    found = {run.name: {each.about.code: each for each in advice(run.results, run.seen)} for run in beside.runs}
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
    parts = [(plots.OUTCOMES.get(outcome, "o-cancelled"), n, f"{outcome}: {n:,}") for outcome, n in summary["outcomes"].items()]
    return bar(parts) + legend((kind, said) for kind, _, said in parts)


def _over_time(beside: _Beside) -> str:
    def draw(run: Reported) -> str:
        if not run.seen.lives:
            return '<p class="note">No event says when its trials ran.</p>'
        links = {trial_id: _anchor(beside.runs.index(run), trial_id, run) for trial_id in run.timelines}
        faults = [
            [FAULTS[kind], f"{each['count']:,}", plots.duration(each["first_s"]), plots.duration(each["last_s"])]
            for kind, each in run.figures["faults"].items()
        ]
        missing = len(run.results) - sum(r.trial_id in run.seen.lives for r in run.results)
        note = f'<p class="note">Of {counted(missing, "trial")} no event is left.</p>' if missing else ""
        note += '<p class="note">Older events are not kept: faults and recoveries are those since then.</p>' if run.seen.cut else ""
        return (
            plots.trials_over_time(run.seen, beside.time, beside.most_running)
            + table(("fault", "how many", "first after", "last after"), faults)
            + f"<h3>Trial by trial</h3>{plots.each_trial(run.results, run.seen, beside.time, links)}{note}"
        )

    return beside.each(draw)


def _recovery(beside: _Beside) -> str:
    def draw(run: Reported) -> str:
        if not run.seen.recoveries:
            return ""
        head = ("why the session had to move", "how many", *(f"{q} % within" for q in QUANTILES), "all within")
        rows = [
            [reason, f"{each['count']:,}", *(plots.duration(each[f"p{q}"]) for q in QUANTILES), plots.duration(each["max"])]
            for reason, each in run.figures["recoveries"].items()
        ]
        return plots.recovery_times(run.seen, beside.recovery) + table(head, rows)

    about = '<p class="note">From when another engine had the session, to its next token. The share that took at most so long.</p>'
    drawn = beside.each(draw)
    return about + drawn if drawn else ""


def _tokens(beside: _Beside) -> str:
    def draw(run: Reported) -> str:
        t = run.summary
        useful, whole = t["tokens_generated"] - t["tokens_wasted"], t["tokens_generated"] or 1
        parts = [
            ("generated", t["tokens_generated"]),
            ("in trajectories", useful),
            ("wasted", t["tokens_wasted"]),
            ("reused", t["tokens_reused"]),
        ]
        parts += [(f"wasted: {why}", n) for why, n in run.figures["wasted_by"].items()]
        rows = [[name, f"{n:,}", f"{n / whole:.2%}"] for name, n in parts]
        over = plots.tokens_over_time(beside.time, beside.bins[run.name], beside.most_tokens, run.seen) if beside.bins[run.name] else ""
        return plots.token_split(t) + _TOKEN_KEY + over + table(("tokens", "how many", "of all generated"), rows)

    about = (
        '<p class="note">Generated are all that engines sampled for these trials; wasted those in no trajectory; '
        "reused those that were gone on from after a fault, and did not have to be sampled again.</p>"
    )
    return about + beside.each(draw)


def _with_and_without(beside: _Beside) -> str:
    tokens, reward = beside.over(_useful), beside.over(_reward)

    def draw(run: Reported) -> str:
        drawn = plots.distribution(run.results, _useful, tokens, plots.count, "Tokens of a trajectory")
        if any(r.reward is not None for r in run.results):
            drawn += plots.distribution(run.results, _reward, reward, _decimal, "Rewards")
        return drawn + plots.DISTRIBUTION_KEY + table(HEAD, rows_within(within(run.results)))

    reference, *others = beside.runs
    compared = "".join(
        f"<h3>{escape(run.name)} beside {escape(reference.name)}, the same trials</h3>"
        + table(HEAD, rows_between(between(reference.results, run.results), reference.name, run.name))
        for run in others
    )
    return beside.each(draw) + '<p class="note">Means; the difference with its 95 % interval.</p>' + compared


def _worst(beside: _Beside) -> str:
    def draw(run: Reported) -> str:
        number = beside.runs.index(run)
        head = ("trial", "why", "attempts", "generated", "wasted", "longest wait", "seconds")
        rows = [_worst_row(_anchor(number, each["trial_id"], run), each) for each in run.figures["worst"]]
        told = "".join(_timeline(_anchor(number, trial_id, run), trial_id, moments) for trial_id, moments in run.timelines.items())
        return table(head, rows, escaped=True, text=2) + told if rows else ""

    drawn = beside.each(draw)
    about = (
        f"At most {WORST}: in turn the next of those that were lost, took most attempts, wasted most tokens, waited longest for a recovery."
    )
    return f'<p class="note">{about}</p>{drawn}' if drawn else ""


def _worst_row(anchor: str, each: JSON) -> list[str]:
    spent = [f"{each[key]:,}" for key in ("attempts", "tokens_generated", "tokens_wasted")]
    said = [f'<a href="#{anchor}">{escape(each["trial_id"])}</a>', escape(each["why"])]
    return [*said, *spent, plots.duration(each["stalled_s"]), plots.duration(each["seconds"])]


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


def _groups(beside: _Beside) -> str:
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


def _replays(beside: _Beside) -> str:
    drawn = beside.each(lambda run: table(DIVERGED, rows_diverged(run.diverged), text=len(DIVERGED)) if run.diverged else "")
    return f'<p class="note">The first difference of each attempt.</p>{drawn}' if drawn else ""


def _trials(beside: _Beside) -> str:
    def draw(run: Reported) -> str:
        ordered = sorted(run.results, key=lambda r: (not r.lost, -r.attempts, r.trial_id))
        rows = [[figure(r.line()[name]) for name in COLUMNS] for r in ordered[:MAX_LISTED]]
        return table([spaced(name) for name in COLUMNS], rows, text=2) + more(ordered, "trials.jsonl")

    return "".join(f"<h3>{escape(run.name)}</h3>{draw(run)}" if len(beside.runs) > 1 else draw(run) for run in beside.runs)


_DRAW: dict[str, Callable[[_Beside], str]] = {
    "advice": _advice, "time": _over_time, "recovery": _recovery, "tokens": _tokens, "faults": _with_and_without, "worst": _worst,
    "groups": _groups, "replays": _replays, "trials": _trials,
}  # fmt: skip
_TOKEN_KEY = legend([("t-useful", "in trajectories"), ("t-wasted", "wasted"), ("t-reused", "reused")])


def _anchor(run: int, trial_id: str, of: Reported) -> str:
    return f"run-{run}-{list(of.timelines).index(trial_id)}"


def _useful(r: TrialResult) -> float | None:
    return r.tokens_generated - r.tokens_wasted


def _reward(r: TrialResult) -> float | None:
    return r.reward


def _decimal(value: float) -> str:
    return f"{value:.3g}"
