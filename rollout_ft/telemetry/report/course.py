"""The run's course: its trials over time, its recoveries, its tokens.

Owns what is said beside the plots; every figure of a plot is in a table as well.
"""

from __future__ import annotations

from rollout_ft.telemetry.figures import QUANTILES
from rollout_ft.telemetry.history import FAULTS
from rollout_ft.telemetry.html import prose, table
from rollout_ft.telemetry.metrics import HISTOGRAMS, RECOVERY_SECONDS
from rollout_ft.telemetry.plots.lives import each_trial
from rollout_ft.telemetry.plots.recoveries import recovery_times
from rollout_ft.telemetry.plots.running import trials_over_time
from rollout_ft.telemetry.plots.tokens import token_split, tokens_over_time
from rollout_ft.telemetry.report.beside import Beside, Reported, anchor
from rollout_ft.telemetry.svg import legend
from rollout_ft.telemetry.words import counted, duration

_TOKEN_KEY = legend([("t-useful", "in trajectories"), ("t-wasted", "wasted"), ("t-reused", "reused")])


def over_time(beside: Beside) -> str:
    def draw(run: Reported) -> str:
        if not run.seen.lives:
            return '<p class="note">No event says when its trials ran.</p>'
        links = {trial_id: anchor(beside.runs.index(run), trial_id, run) for trial_id in run.timelines}
        faults = [
            [FAULTS[kind], f"{each['count']:,}", duration(each["first_s"]), duration(each["last_s"])]
            for kind, each in run.figures["faults"].items()
        ]
        missing = len(run.results) - sum(r.trial_id in run.seen.lives for r in run.results)
        note = f'<p class="note">Of {counted(missing, "trial")} no event is left.</p>' if missing else ""
        note += '<p class="note">Older events are not kept: faults and recoveries are those since then.</p>' if run.seen.cut else ""
        return (
            trials_over_time(run.seen, beside.time, beside.most_running)
            + table(("fault", "how many", "first after", "last after"), faults)
            + f"<h3>Trial by trial</h3>{each_trial(run.results, run.seen, beside.time, links)}{note}"
        )

    return beside.each(draw)


def recovery(beside: Beside) -> str:
    def draw(run: Reported) -> str:
        if not run.seen.recoveries:
            return ""
        head = ("why the session had to move", "how many", *(f"{q} % within" for q in QUANTILES), "all within")
        rows = [
            [reason, f"{each['count']:,}", *(duration(each[f"p{q}"]) for q in QUANTILES), duration(each["max"])]
            for reason, each in run.figures["recoveries"].items()
        ]
        return recovery_times(run.seen, beside.recovery) + table(head, rows)

    about = f'<p class="note">{prose(HISTOGRAMS[RECOVERY_SECONDS].sentence)} The share that took at most so long.</p>'
    drawn = beside.each(draw)
    return about + drawn if drawn else ""


def tokens(beside: Beside) -> str:
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
        over = tokens_over_time(beside.time, beside.bins[run.name], beside.most_tokens, run.seen) if beside.bins[run.name] else ""
        return token_split(t) + _TOKEN_KEY + over + table(("tokens", "how many", "of all generated"), rows)

    about = (
        '<p class="note">Generated are all that engines sampled for these trials; wasted those in no trajectory; '
        "reused those that were gone on from after a fault, and did not have to be sampled again.</p>"
    )
    return about + beside.each(draw)
