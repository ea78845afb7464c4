"""What `serve --output DIR` keeps of a run whose trials are somebody else's.

Owns the directory's lines, counters and summary; what is in it is made of the run's events alone, so that `status`, `report`, `audit`
and `trial list` tell of it what they tell of `run`. Trajectories are with who collects them. The subtle invariant: a trial has one
line, however often its end is told, and whichever process heard it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson

from rollout_ft.cli.directory import Directory, create, has_run, reopen
from rollout_ft.clock import monotonic, wall
from rollout_ft.config import Config, journalled
from rollout_ft.disk import whole
from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.eventsfile import EventsFile, read_events
from rollout_ft.telemetry.figures import totals
from rollout_ft.telemetry.lines import Lines, read_lines
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON


def place(path: Path, config: Config) -> Directory:
    """A directory for this run; one that has it already where a journal has its trials, or nothing ever happened. Raises ConfigError."""
    if not has_run(path):
        return create(path, config, [])
    if journalled(config):
        return reopen(path, config)
    if next(read_events(path), None) is None:  # a start that failed
        return replace(reopen(path, config), resumed=False)
    raise ConfigError(f"--output: {path} has a run that ended with its process; choose an empty directory, or set store.journal_dir")


class Served:
    def __init__(self, directory: Directory):
        self._path, self._began = directory.path, monotonic()
        self._events = EventsFile(directory.path, directory.config.telemetry.max_events_bytes)
        file = directory.path / "trials.jsonl"
        self._told = {line["trial_id"] for line in read_lines(file)}
        self._lines = Lines(file)
        self._earlier_s = self._events.account.seconds
        for event in read_events(directory.path):  # of a process that ended between an event and its line
            self._line(event)
        if directory.resumed:
            self._events.append({"time": wall(), "event": "run.resumed", "source": "run", "trials": len(self._events.account.running)})

    @property
    def last_view(self) -> int:
        return self._events.account.view

    def started(self, gateway_url: str) -> None:
        self._events.append({"time": wall(), "event": "run.started", "source": "run", "gateway_url": gateway_url})

    def event(self, event: JSON) -> None:
        self._events.append(event)
        self._line(event)

    def _line(self, event: JSON) -> None:
        if event.get("event") == "trial.ended" and event["trial"] not in self._told and (result := result_of(event)) is not None:
            self._lines.append(result.line())
            self._told.add(event["trial"])

    def close(self, metrics: dict[str, float]) -> None:
        """Writes what the run came to; `metrics` is empty where nobody could be asked."""
        results = [TrialResult(**line) for line in read_lines(self._path / "trials.jsonl")]
        seconds = round(self._earlier_s + monotonic() - self._began, 1)
        summary = {**totals(results), "unfinished": len(self._events.account.running), "seconds": seconds}
        for name, data in (("summary.json", summary), ("metrics.json", metrics)):
            if data:
                with whole(self._path / name) as file:
                    file.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
        self._lines.close()
        self._events.close()


def result_of(ended: JSON) -> TrialResult | None:
    """From a trial's `trial.ended`; None where another version told it."""
    try:
        return TrialResult(
            ended["trial"], ended["task"], ended["outcome"], ended["reward"], ended["cause"], ended["attempts"], ended["turns"],
            ended["faults_survived"], ended["tokens_generated"], ended["tokens_reused"], ended["tokens_wasted"], float(ended["seconds"]),
            group_id=ended["group"],
        )  # fmt: skip
    except KeyError:
        return None
