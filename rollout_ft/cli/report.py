"""`rollout-ft report DIR [DIR …]`: what faults, and what losing trials to them, did to what a trainer gets.

Owns what is read and how it is shown; the comparison is `telemetry.bias`'s. Changes nothing in the directories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.bias import HEAD, between, grouped, rows_between, rows_grouped, rows_within, within
from rollout_ft.telemetry.divergences import HEAD as DIVERGED
from rollout_ft.telemetry.divergences import divergences, rows_diverged
from rollout_ft.telemetry.lines import read_lines
from rollout_ft.trial.groups import GroupResult
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON

Line = TypeVar("Line", TrialResult, GroupResult)


def figures(directories: Sequence[Path]) -> JSON:
    """`{runs: {DIR: within}, groups: {DIR: grouped}, beside: {DIR: between}, diverged: {DIR: divergences}}`, the others beside
    the first; `groups` of the runs that have some. Raises ConfigError naming the directory."""
    if len(set(directories)) < len(directories):
        raise ConfigError("a directory is named twice: nothing differs from itself")
    runs = {str(each): _results(each) for each in directories}
    groups = {str(each): _read(each / "groups.jsonl", GroupResult) for each in directories}
    reference, *others = runs
    return {
        "runs": {name: within(results) for name, results in runs.items()},
        "groups": {name: grouped(runs[name], decided) for name, decided in groups.items() if decided},
        "beside": {name: between(runs[reference], runs[name]) for name in others},
        "diverged": {str(each): divergences(read_lines(each / "events.jsonl")) for each in directories},
    }


def tables(found: JSON) -> list[Table]:
    made = [_table(f"{name}: {_lost(run)}", rows_within(run)) for name, run in found["runs"].items()]
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
        made.add_row(*(escape(cell) for cell in row))
    return made


def _lost(run: JSON) -> str:
    return f"{run['met']['trials'] + run['clean']['trials'] + run['lost']:,} trials, {run['lost']:,} lost"


def _table(title: str, rows: list[list[str]]) -> Table:
    made = Table(*HEAD, title=title, caption="means; differences with their 95 % interval")
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*row)
    return made


def _results(directory: Path) -> list[TrialResult]:
    path = directory / "trials.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: name a directory that `rollout-ft run` wrote to")
    found = _read(path, TrialResult)
    if not found:
        raise ConfigError(f"{path} has no result yet")
    return found


def _read(path: Path, of: Callable[..., Line]) -> list[Line]:
    try:
        return [of(**line) for line in read_lines(path)]
    except TypeError as e:
        raise ConfigError(f"{path} has a line that is none of a run's ({e})") from None
