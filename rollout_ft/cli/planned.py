"""The trials that a run's directory plans, and which of them are owed.

Owns how tasks, config and lines make a board where no process of the run is asked. Changes nothing in the directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rollout_ft.cli.directory import tasks_of
from rollout_ft.config import TrialConfig
from rollout_ft.trial.board import Board
from rollout_ft.trial.groups import LOST
from rollout_ft.trial.siblings import plays
from rollout_ft.types import JSON


def planned(directory: Path, config: TrialConfig, lines: Iterable[JSON]) -> Board:
    """`lines` of `trials.jsonl`. Raises ConfigError where its tasks cannot be read."""
    board = Board(plays(tasks_of(directory), config), config)
    for line in lines:
        board.ended(line["trial_id"], lost=line["outcome"] in LOST, reward=line.get("reward"))
    return board
