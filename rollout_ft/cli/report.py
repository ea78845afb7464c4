"""`rollout-ft report DIR [DIR …]`: what became of a run, and what faults, and losing trials to them, did to what a trainer gets.

Owns what is read, where the page is written, and what a terminal shows; figures and page are `telemetry`'s. Changes nothing else in
the directories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

from rollout_ft.cli.directory import saved_config, tasks_of
from rollout_ft.cli.output import summary_of
from rollout_ft.cli.planned import planned
from rollout_ft.clock import wall
from rollout_ft.disk import whole
from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.bias import HEAD, between, grouped, rows_between, rows_grouped, rows_within, within
from rollout_ft.telemetry.divergences import HEAD as DIVERGED
from rollout_ft.telemetry.divergences import divergences, rows_diverged
from rollout_ft.telemetry.eventsfile import read_events
from rollout_ft.telemetry.figures import QUANTILES, fell_short
from rollout_ft.telemetry.figures import figures as figures_of
from rollout_ft.telemetry.history import history
from rollout_ft.telemetry.lines import read_lines
from rollout_ft.telemetry.moments_made import of_paths
from rollout_ft.telemetry.moments_told import of_events
from rollout_ft.telemetry.report import Reported, report
from rollout_ft.telemetry.timeline import merged
from rollout_ft.telemetry.words import counted, duration, printable
from rollout_ft.trial.groups import LOST, GroupResult
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

PAGE, COMPARED = "report.html", "compared.html"
Line = TypeVar("Line", TrialResult, GroupResult)


def reported(directory: Path) -> Reported:
    """A run as its directory has it by now."""
    results, events = results_of(directory), list(read_events(directory))
    seen = history(events)
    found = figures_of(results, seen)
    worst = [each["trial_id"] for each in found["worst"]]
    told = of_events(worst, events)
    totals = summary_of(directory) | found["totals"] | _owed(directory, results)
    return Reported(
        str(directory), results, seen, totals, found, _read(directory / "groups.jsonl", GroupResult), divergences(events),
        {trial_id: merged(told[trial_id], of_paths(_paths(directory, trial_id))) for trial_id in worst},
    )  # fmt: skip


def _owed(directory: Path, results: Sequence[TrialResult]) -> JSON:
    """How many trials are unfinished: of a run that is under way or was killed no summary says it, or an old one. Nothing of a
    directory that another version wrote, or whose trials are somebody else's."""
    try:
        if not tasks_of(directory):
            return {}
        return {"unfinished": len(planned(directory, saved_config(directory).trial, (r.line() for r in results)).owed)}
    except ConfigError:
        return {}


def results_of(directory: Path) -> list[TrialResult]:
    """Raises ConfigError naming the file that is not there."""
    path = directory / "trials.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: name a directory that `rollout-ft run` wrote to")
    return _read(path, TrialResult)


def write(runs: Sequence[Reported], output: Path | None = None) -> Path:
    """Writes the page: unless told otherwise the one run's own, or beside it that of several."""
    path = output or Path(runs[0].name) / (PAGE if len(runs) == 1 else COMPARED)
    with whole(path) as temporary:
        temporary.write_text(report(runs, wall()))
    return path


def read(directories: Sequence[Path]) -> list[Reported]:
    """Raises ConfigError naming the directory."""
    if len(set(directories)) < len(directories):
        raise ConfigError("a directory is named twice: nothing differs from itself")
    runs = [reported(each) for each in directories]
    empty = next((run.name for run in runs if not run.results), None)
    if empty is not None:
        raise ConfigError(f"{empty}/trials.jsonl has no result yet")
    return runs


def figures(runs: Sequence[Reported]) -> JSON:
    """`{figures: {DIR: figures}, runs: {DIR: within}, groups: {DIR: grouped}, beside: {DIR: between}, diverged: {DIR: divergences}}`,
    the others beside the first; `groups` of the runs that have some."""
    reference, *others = runs
    return {
        "figures": {run.name: {**run.figures, "totals": run.summary} for run in runs},
        "runs": {run.name: within(run.results) for run in runs},
        "groups": {run.name: grouped(run.results, run.groups) for run in runs if run.groups},
        "beside": {run.name: between(reference.results, run.results) for run in others},
        "diverged": {run.name: list(run.diverged) for run in runs},
    }


def tables(found: JSON) -> list[Table]:
    made = [_totals(found)]
    for name, each in found["figures"].items():
        made += [_recoveries(name, each["recoveries"])] if each["recoveries"] else []
        made += [_worst(name, each["worst"])] if each["worst"] else []
    made += [_table(f"{name}: {_said(found['figures'][name]['totals'])}", rows_within(run)) for name, run in found["runs"].items()]
    for name, each in found["groups"].items():
        counts = ", ".join(f"{count:,} {status}" for status, count in each["groups"].items())
        made.append(_table(f"{name}: groups: {counts}", rows_grouped(each)))
    reference = next(iter(found["runs"]))
    for name, apart in found["beside"].items():
        alone = f"; {apart['elsewhere']} trials are in one of them alone" if apart["elsewhere"] else ""
        made.append(_table(f"{name} beside {reference}, the same trials{alone}", rows_between(apart, reference, name)))
    return made + [_replays(name, met) for name, met in found["diverged"].items() if met]


def _replays(name: str, met: list[JSON]) -> Table:
    made = Table(
        *DIVERGED, title=f"{name}: where replays first left their record", caption="texts may be made equal by session.normalizers"
    )
    for row in rows_diverged(met):
        made.add_row(*(escape(printable(cell)) for cell in row))
    return made


def _said(summary: JSON) -> str:
    unfinished = f"{summary['unfinished']:,} unfinished" if summary.get("unfinished") else ""
    lost = f"{sum(count for outcome, count in summary['outcomes'].items() if outcome in LOST):,} lost"
    return escape(", ".join(filter(None, (counted(summary["trials"], "trial"), lost, fell_short(summary["outcomes"]), unfinished))))


def _table(title: str, rows: list[list[str]]) -> Table:
    made = Table(*HEAD, title=title, caption="means; differences with their 95 % interval")
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*row)
    return made


def _totals(found: JSON) -> Table:
    made = Table("", "trials", *_TOTALS, title="what was spent")
    for column in made.columns[1:]:
        column.justify = "right"
    for name, each in found["figures"].items():
        totals = each["totals"]
        made.add_row(escape(name), f"{totals['trials']:,}", *(f"{totals[key]:,}" for key in _TOTALS.values()))
    return made


_TOTALS = {"attempts": "attempts", "generated": "tokens_generated", "reused": "tokens_reused", "wasted": "tokens_wasted"}


def _recoveries(name: str, found: JSON) -> Table:
    made = Table("why", "how many", *(f"{q} % within" for q in QUANTILES), "all within", title=f"{name}: recoveries, to the next token")
    for reason, each in found.items():
        made.add_row(reason, f"{each['count']:,}", *(duration(each[f"p{q}"]) for q in QUANTILES), duration(each["max"]))
    return made


def _worst(name: str, found: list[JSON]) -> Table:
    made = Table("trial", "why", "seconds", title=f"{name}: the worst trials", caption="rollout-ft trial show DIR TRIAL says what was said")
    for each in found:
        made.add_row(escape(each["trial_id"]), escape(each["why"]), f"{each['seconds']:,.1f}")
    return made


def _paths(directory: Path, trial_id: str) -> list[JSON]:
    """Of a trajectory that is there: what is said of its turns, without its tokens."""
    file = directory / "trajectories" / f"{trial_id}.safetensors"
    if not file.exists():
        return []
    with cast(Any, safe_open)(file, "np") as opened:
        return orjson.loads(opened.metadata()["trial"])["paths"]


def _read(path: Path, of: Callable[..., Line]) -> list[Line]:
    try:
        return [of(**line) for line in read_lines(path)]
    except TypeError as e:
        raise ConfigError(f"{path} has a line that is none of a run's ({e})") from None
