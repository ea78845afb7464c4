"""A run whose agent is a program, killed with its cluster in the middle of an attempt and gone on with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_files import SLOW, clean, data, first_tasks, goes_on, kill, settings

AGENT = Path("examples/openai-tool-loop/agent.py").absolute()
PROGRAM = ["trial.agent=", f"trial.command=[{sys.executable},{AGENT}]"]


def in_an_attempt(out: Path) -> bool:
    """A tool has run, in an attempt that has not ended."""
    return any(out.glob("attempts/*/own/notebook"))


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_run_of_programs_that_was_killed_goes_on_and_leaves_no_sandbox(tmp_path: Path):
    out, tasks = tmp_path / "out", first_tasks(tmp_path / "tasks.jsonl", 3)
    kill(in_an_attempt, out, *settings(tasks, speed=SLOW), *PROGRAM)
    assert list((out / "attempts").iterdir()), "it was not killed in an attempt"
    code, err = goes_on(out)
    assert code == 0, err
    assert list((out / "attempts").iterdir()) == []
    assert data(out) == clean(tmp_path / "clean", tasks, *PROGRAM)
