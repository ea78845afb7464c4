"""A run that is killed with its cluster goes on, and gives what an undisturbed one gives, to the bit. Real processes, real
Ray; the other ways in which a run can end are in `tests/cluster/test_outlived.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import SLOW, clean, data, first_tasks, goes_on, kill, lines, settings, under_way

from rollout_ft.cli.trials import Past

TASKS = 5


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_run_that_was_killed_in_the_middle_gives_what_an_undisturbed_one_gives(tmp_path: Path):
    out, tasks = tmp_path / "out", first_tasks(tmp_path / "tasks.jsonl", TASKS)
    kill(under_way, out, *settings(tasks, speed=SLOW))
    assert not (out / "summary.json").exists()
    before = {line["trial_id"]: line for line in lines(out / "trials.jsonl")}
    states = {row["trial_id"]: row["state"] for row in Past(out).listed()["trials"]}
    assert {states[trial_id] for trial_id in before} <= {"ended", "collected"}
    assert "unfinished" in states.values()
    code, err = goes_on(out)
    assert code == 0, err
    assert data(out) == clean(tmp_path / "clean", tasks)
    after = {line["trial_id"]: line for line in lines(out / "trials.jsonl")}
    assert after | before == after, "what had ended is not run again"
    assert json.loads((out / "summary.json").read_text())["outcomes"] == {"completed": TASKS}
