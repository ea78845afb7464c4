"""`rollout-ft trial list | show | export`: the trials of a run directory, with no cluster.

Owns what is read where: trials that were collected from what `run` wrote, the others from the journals. Changes nothing
in the directory, so that it may be asked while its run goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from rollout_ft.cli.directory import saved_config, with_journal
from rollout_ft.cli.journals import Journals, PastTrial
from rollout_ft.cli.output import trajectory_path
from rollout_ft.cli.planned import planned
from rollout_ft.cli.transcript import made, text, transcript
from rollout_ft.config import Config, journalled
from rollout_ft.errors import ConfigError
from rollout_ft.samples.export import read_trajectory, write_trajectory
from rollout_ft.samples.parquet import write_parquet
from rollout_ft.samples.rows import rows_of
from rollout_ft.samples.selection import Selection, select
from rollout_ft.samples.trajectory import trajectory
from rollout_ft.session.drift import load_renderer
from rollout_ft.session.render import Renderer
from rollout_ft.session.session import Session
from rollout_ft.telemetry.eventsfile import read_events
from rollout_ft.telemetry.lines import read_lines
from rollout_ft.telemetry.moments import Kind
from rollout_ft.telemetry.moments_made import of_entries, of_paths
from rollout_ft.telemetry.moments_told import concerning
from rollout_ft.telemetry.timeline import timeline
from rollout_ft.telemetry.words import printable, shortened
from rollout_ft.types import JSON

COLUMNS = ("trial_id", "state", "outcome", "reward", "attempts", "turns", "cause")
CAUSE_CHARACTERS, LEAST = 300, 20
"""Of a cause so many are listed, and on a narrow terminal not fewer than the least."""


class Past:
    def __init__(self, directory: Path):
        self.directory = directory
        self.config = with_journal(saved_config(directory), directory.absolute())
        self._journals = Journals(self.config)
        self._lines = {line["trial_id"]: line for line in read_lines(directory / "trials.jsonl") if {"trial_id", "outcome"} <= line.keys()}
        self._board = planned(directory, self.config.trial, self._lines.values())

    def listed(self) -> JSON:
        """`{trials: [row], unreadable: [why]}`: a row for every trial, begun or not; `unknown` where no journal says which,
        `not_needed` where its group is decided without it."""
        rows = {trial.trial_id: self._row(trial) for trial in self._journals.trials()}
        for trial_id, line in self._lines.items():
            rows.setdefault(trial_id, _of_line(line))
        owed, not_begun = {play.trial_id for play in self._board.owed}, "not_started" if journalled(self.config) else "unknown"
        for play in self._board.plays:
            about = {"task_id": str(play.task["task_id"]), "state": not_begun if play.trial_id in owed else "not_needed"}
            rows.setdefault(play.trial_id, PastTrial(play.trial_id, released=True).row() | about)
        return {"trials": [rows[trial_id] for trial_id in sorted(rows)], "unreadable": self._journals.unreadable}

    def shown(self, trial_id: str) -> JSON:
        """A trial's row and its `timeline`, with `attempts_made` where the journal still has its turns, else with `paths` as text."""
        trial = self._find(trial_id)
        if trial.damaged:
            return self._row(trial)
        paths, turns = self._decoded(trial_id) if trial.released else ([], [])
        made = of_paths(turns) if trial.released else of_entries(trial.entries)
        moments = timeline(trial_id, list(read_events(self.directory, concerning(trial_id))), made)
        row = self._row(trial) | {"timeline": [moment.line() for moment in moments]}
        return row | ({"paths": paths} if trial.released else {"attempts_made": transcript(trial.entries, self._chosen(trial))})

    def _chosen(self, trial: PastTrial) -> Selection | None:
        """What the trajectory has by now; None where it has not begun, or its model is not on this machine."""
        try:
            return select(_session(trial, self.config, load_renderer(self.config))) if trial.entries else None
        except ConfigError:
            return None

    def export(self, output: Path, chosen: list[str], *, unfinished: bool) -> JSON:
        """Writes trajectories as `run` does; `{exported: [trial_id], skipped: {trial_id: why}}`."""
        output.mkdir(parents=True, exist_ok=True)
        trials = [self._find(trial_id) for trial_id in dict.fromkeys(chosen) or [row["trial_id"] for row in self.listed()["trials"]]]
        exported: list[str] = []
        skipped: dict[str, str] = {}
        renderer = load_renderer(self.config) if any(trial.entries for trial in trials) else None
        for trial in trials:
            why = self._export(trial, output, renderer, unfinished)
            if why:
                skipped[trial.trial_id] = why
            else:
                exported.append(trial.trial_id)
        return {"exported": exported, "skipped": skipped}

    def samples(self, output: Path, trial_ids: list[str]) -> JSON:
        """Writes `samples.parquet` beside trajectories that were exported; `{samples, left_out}`, how many rows it has, and the
        trials that do not count in their groups, which have none."""
        outcomes = {row["trial_id"]: row["outcome"] for row in self.listed()["trials"]}
        left_out = [trial_id for trial_id in trial_ids if not self._board.counts(trial_id)]
        wanted = [trial_id for trial_id in trial_ids if trial_id not in set(left_out)]

        def trials() -> Iterator[list[JSON]]:
            for trial_id in wanted:
                made = read_trajectory(output / f"{trial_id}.safetensors")
                yield rows_of(made, made["reward"], outcomes[trial_id])

        return {"samples": write_parquet(output / "samples.parquet", trials()), "left_out": left_out}

    def _export(self, trial: PastTrial, output: Path, renderer: Renderer | None, unfinished: bool) -> str:
        """Why not; empty when it was written."""
        file = output / f"{trial.trial_id}.safetensors"
        if trial.damaged:
            return trial.damaged
        if trial.released:
            there = trajectory_path(self.directory, trial.trial_id)
            if not there.exists():
                return f"it was collected, and {there} is not there"
            shutil.copy(there, file)  # as private as it is there
            return ""
        if renderer is None or not trial.entries:
            return "it has not begun"
        if trial.ended is None and not unfinished:
            return "it has no outcome yet"
        session = _session(trial, self.config, renderer)
        if not session.tree.nodes:
            return "it has no turn"
        write_trajectory(file, trajectory(session), trial.ended.reward if trial.ended else None)
        return ""

    def _find(self, trial_id: str) -> PastTrial:
        trial = self._journals.trial(trial_id)
        if trial.entries or trial.released or trial.trial_id in {each.trial_id for each in self._journals.trials()}:
            return trial
        if trial_id in self._lines:
            return PastTrial(trial_id, released=True)
        if any(play.trial_id == trial_id for play in self._board.plays):
            return PastTrial(trial_id)
        raise ConfigError(f"{self.directory} has no trial {trial_id}; rollout-ft trial list {self.directory}")

    def _row(self, trial: PastTrial) -> JSON:
        if trial.released and trial.trial_id in self._lines:
            return _of_line(self._lines[trial.trial_id])
        return trial.row()

    def _decoded(self, trial_id: str) -> tuple[list[list[JSON]], list[JSON]]:
        """The paths of a collected trial as text, and as what is said of their turns."""
        file = trajectory_path(self.directory, trial_id)
        if not file.exists():
            return [], []
        renderer = load_renderer(self.config)
        with cast(Any, safe_open)(file, "np") as opened:
            paths = json.loads(opened.metadata()["trial"])["paths"]
            return [_pieces(renderer, opened.get_tensor(f"{i}.token_ids").tolist(), path) for i, path in enumerate(paths)], paths


def _of_line(line: JSON) -> JSON:
    return {"state": "collected"} | {key: line[key] for key in ("trial_id", "task_id", "outcome", "reward", "attempts", "turns", "cause")}


def _session(trial: PastTrial, config: Config, renderer: Renderer) -> Session:
    session = Session(
        trial.opened[0].spec, trial.opened[0].attempt, renderer, config.session, run_seed=config.seed,
        context_tokens=config.model.usable_tokens, resampled=config.samples.resampled,
    )  # fmt: skip
    session.restore(list(trial.entries), [])
    return session


def _pieces(renderer: Renderer, ids: list[int], path: JSON) -> list[JSON]:
    """A path's turns as text: what the model was given and what it said, special tokens and all."""
    pieces: list[JSON] = []
    at = 0
    for turn in path["turns"]:
        given, said = ids[at : turn["start"]], ids[turn["start"] : turn["end"]]
        about = {key: turn[key] for key in ("finish_reason", "generations", "evidence")} | {"tokens": len(said)}
        about |= {key: turn.get(key, nothing) for key, nothing in _SINCE.items()}
        spans = (span["version"] for span in path["version_spans"] if span["start"] < turn["end"] and span["end"] > turn["start"])
        about["versions"] = list(dict.fromkeys(spans))
        pieces.append(about | {"prompt": renderer.text(given, keep_special=True), "output": renderer.text(said, keep_special=True)})
        at = turn["end"]
    return pieces


_SINCE: JSON = {"engine": "", "seconds": 0.0, "tokens_reused": 0, "tokens_wasted": 0}
"""What older trajectories do not say of a turn."""
_IN_THE_TRANSCRIPT = {Kind.TURN, Kind.REPLAYED, Kind.STEP, Kind.DIVERGED}


def table(rows: Sequence[JSON], width: int | None) -> Iterator[str]:
    """A line for each row, and the head. Nothing is cut but the cause, to a terminal's `width`: an id is there to be copied."""
    cells = [COLUMNS, *(tuple(_cell(row.get(name)) for name in COLUMNS) for row in rows)]
    *widths, _ = [max(map(len, column)) for column in zip(*cells, strict=True)]
    most = CAUSE_CHARACTERS if width is None else max(LEAST, width - sum(widths) - 2 * len(widths))
    for *first, cause in cells:
        padded = [cell.ljust(size) for cell, size in zip(first, widths, strict=True)]
        yield "  ".join([*padded, shortened(cause, most)]).rstrip()


def _cell(value: object) -> str:
    return "" if value is None else printable(" ".join(str(value).split()))


def lines(shown: JSON) -> list[str]:
    """A shown trial for people."""
    head = f"trial {shown['trial_id']}: {shown['state']}"
    head += f", {shown['outcome']}, reward {shown['reward']}" if shown["outcome"] else ""
    told = [head, *([shown["cause"]] if shown["cause"] else []), *_befell(shown), *text(shown.get("attempts_made", ()))]
    for number, path in enumerate(shown.get("paths", ()), start=1):
        told.append(f"path {number}, as it is trained on")
        for piece in path:
            told += [*_indented(piece["prompt"], "  > "), *_indented(piece["output"], "  < "), f"    {made(piece)}, {piece['evidence']}"]
    return [printable(line) for line in told]


def _befell(shown: JSON) -> list[str]:
    """What the transcript does not tell; of a collected trial there is none, and all is told here."""
    moments: Sequence[JSON] = shown.get("timeline", ())
    rows = [moment for moment in moments if moment["kind"] not in _IN_THE_TRANSCRIPT or "attempts_made" not in shown]
    began = moments[0]["time"] if moments else 0
    return [f"  +{moment['time'] - began:8.2f} s  {moment['kind']:<9}  {moment['text']}" for moment in rows]


def _indented(words: str, mark: str) -> list[str]:
    return [mark + line for line in words.splitlines()]
