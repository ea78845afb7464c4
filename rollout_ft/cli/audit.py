"""`rollout-ft audit DIR`: whether a run's events, lines, summary and counters agree to the token.

Owns what is read and how it is shown; the comparison is `telemetry.audit`'s. Changes nothing in the directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from rich.markup import escape
from rich.table import Table

from rollout_ft.cli.output import summary_of
from rollout_ft.cli.report import results_of
from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.account import account
from rollout_ft.telemetry.audit import Audit, audit
from rollout_ft.telemetry.eventsfile import read_events


def audited(directory: Path) -> Audit:
    """Raises ConfigError where there is no run with results."""
    results, summary = results_of(directory), summary_of(directory)
    if not summary:
        raise ConfigError(
            f"{directory} has no whole summary.json: the run is under way, or was killed; rollout-ft resume {directory} ends it"
        )
    return audit(account(read_events(directory)), results, summary, _json(directory / "metrics.json"))


def shown(made: Audit) -> Iterator[Table | str]:
    figures = Table("", "events", "trials.jsonl", "summary.json", "counters", title="what each says")
    for name, said in made.figures.items():
        figures.add_row(name, *("" if count is None else f"{count:,}" for count in said.values()))
    faults = Table("", "what", "count", title="what the events tell of faults")
    for kind, counts in made.faults.items():
        for what, count in sorted((+Counter(counts)).items()):
            faults.add_row(kind, escape(what), f"{count:,}")
    for table, first in ((figures, 1), (faults, 2)):
        for column in table.columns[first:]:
            column.justify = "right"
    yield figures
    if faults.row_count:
        yield faults
    yield from made.notes
    yield from made.wrong or ["all that is known agrees, and nothing of it is left open" if made.notes else _AGREES]


_AGREES = "all agree, and nothing is left open"


def _json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes()) if path.exists() else None
    except orjson.JSONDecodeError as e:
        raise ConfigError(f"{path} is not JSON ({e}): it was written by something else") from None
