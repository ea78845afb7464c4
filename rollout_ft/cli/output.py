"""What a run writes for people and trainers.

Owns `DIR/trials.jsonl`, `DIR/groups.jsonl`, `DIR/trajectories/`, `DIR/metrics.json` and `DIR/summary.json`;
`DIR/events.jsonl` is `telemetry.eventsfile`'s.
Decides nothing. All of it is derived from outcomes that the store has: a trial whose line or trajectory is not there whole is
owed, and asked for again; a trajectory is written before its line, and a group's line is made of those of its trials.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.disk import whole
from rollout_ft.samples.export import write_trajectory
from rollout_ft.telemetry.eventsfile import EventsFile
from rollout_ft.telemetry.figures import totals
from rollout_ft.telemetry.lines import Lines, read_lines
from rollout_ft.trial.board import Board
from rollout_ft.trial.groups import GroupResult, Status
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON


class Output:
    """`results` are the trials with a line, those of earlier processes too; `lost` those that could not be ended. `board` is of all
    trials of the run, and has not heard of any."""

    def __init__(self, directory: Path, board: Board, max_events_bytes: int):
        self._directory, self._board = directory, board
        (directory / "trajectories").mkdir(exist_ok=True)
        self.results = {result.trial_id: result for result in _settled(directory)}
        self.lost: list[TrialResult] = []
        self._told, self._untold = set[str](), set[str]()
        """Trials whose end an event told to this process, and those whose result it has."""
        self._trials = Lines(directory / "trials.jsonl")
        self._events = EventsFile(directory, max_events_bytes)
        self._earlier_s = max(self._events.account.seconds, float(summary_of(directory).get("seconds", 0.0)))
        """A process that was killed has left its events alone; one that ended has counted its start as well."""
        self._earlier_restarts = self._events.account.restarts.total()
        for result in self.results.values():
            board.ended(result.trial_id, lost=result.lost, reward=result.reward)
        self._groups = self._decided() if board.has_groups else None

    def trial(self, result: TrialResult, trajectory: JSON) -> None:
        if not result.recorded:
            return self.lost.append(result)
        path = trajectory_path(self._directory, result.trial_id)
        if not trajectory.get("released"):
            write_trajectory(path, trajectory, result.reward)
        elif not path.exists():
            return self.lost.append(replace(result, cause=f"it was collected, and {path} is not there any more"))
        self._trials.append(result.line())
        self._trials.sync()  # the stores forget the trial when this returns
        self.results[result.trial_id] = result
        self._untold.add(result.trial_id)
        decided = self._board.ended(result.trial_id, lost=result.lost, reward=result.reward)
        if self._groups is not None and isinstance(decided, GroupResult):
            self._groups.append(decided.line())

    def event(self, event: JSON) -> None:
        self._events.append(event)
        if event["event"] == "trial.ended":
            self._told.add(event["trial"])

    def last_view(self) -> int:
        """The highest view that an earlier process heard of."""
        return self._events.account.view

    def counters(self, metrics: dict[str, float]) -> None:
        """What the actors of this process's run have counted when all trials had ended."""
        _replace(self._directory / "metrics.json", orjson.dumps(metrics, option=orjson.OPT_INDENT_2))

    @property
    def done(self) -> int:
        return len(self.results)

    @property
    def restarts(self) -> int:
        """Attempts that were restarted in this process."""
        return self._events.account.restarts.total() - self._earlier_restarts

    @property
    def running(self) -> int:
        """How many trials were begun and have no end: events tell of an end a little later than its result is here."""
        return len(self._events.account.running.keys() - self.results.keys())

    @property
    def planned(self) -> int:
        return len(self._board.plays)

    @property
    def owed(self) -> int:
        """How many trials have to be played yet."""
        return len(self._board.owed)

    @property
    def replaced(self) -> set[str]:
        """Lost trials of groups that are complete without them."""
        return {trial_id for group in self._board.decided if group.status == Status.COMPLETED for trial_id in group.lost}

    def complete(self) -> bool:
        return not self.owed and bool(summary_of(self._directory))

    def summary(self, seconds: float) -> JSON:
        """Writes and returns the totals of all trials; `seconds` are added to those of earlier processes."""
        untold = (self._untold - self._told) | self._events.account.running.keys()
        for trial_id in sorted(self.results.keys() & untold):  # a supervisor that was lost had it alone
            self._events.append(self.results[trial_id].event())
        made: JSON = {
            **totals(list(self.results.values())), "unfinished": self.owed, "seconds": round(self._earlier_s + seconds, 1)
        }  # fmt: skip
        if self._board.has_groups:
            made["groups"] = dict(Counter(group.status for group in self._board.decided)) | {"undecided": self._board.undecided}
        _replace(self._directory / "summary.json", orjson.dumps(made, option=orjson.OPT_INDENT_2))
        return made

    def _decided(self) -> Lines:
        """The lines of all groups that are decided by now, to be gone on with."""
        path = self._directory / "groups.jsonl"
        _replace_if_other(path, b"".join(orjson.dumps(group.line()) + b"\n" for group in self._board.decided))
        return Lines(path)

    def close(self) -> None:
        for file in (self._trials, self._events, self._groups):
            if file is not None:
                file.close()


def trajectory_path(directory: Path, trial_id: str) -> Path:
    return directory / "trajectories" / f"{trial_id}.safetensors"


def summary_of(directory: Path) -> JSON:
    """`summary.json`; empty where there is none, or none that is whole: it can be made again."""
    try:
        found: Any = orjson.loads((directory / "summary.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return cast(JSON, found) if isinstance(found, dict) else {}


def _settled(directory: Path) -> list[TrialResult]:
    """The trials whose line and trajectory are whole; every other line is taken out of the file."""
    path, found = directory / "trials.jsonl", dict[str, TrialResult]()
    for line in read_lines(path):
        try:
            result = TrialResult(**line)
        except TypeError:
            continue
        if trajectory_path(directory, result.trial_id).exists():
            found.setdefault(result.trial_id, result)
    kept = b"".join(orjson.dumps(result.line()) + b"\n" for result in found.values())
    _replace_if_other(path, kept)
    return list(found.values())


def _replace_if_other(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    with whole(path) as temporary:
        temporary.write_bytes(data)
