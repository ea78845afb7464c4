"""A run that is killed with its cluster goes on, and gives what an undisturbed one gives, to the bit. Real processes, real
Ray; the other ways in which a run can end are in `tests/cluster/test_outlived.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import CONFIG, SLOW, Command, clean, data, events, first_tasks, goes_on, kill, lines, settings, under_way

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


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_groups_of_a_run_that_was_killed_are_those_of_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The trial in the place of a lost one had been begun, and is gone on with: there is no second."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("MORTAL", "q01.1")
    out, undisturbed, tasks = tmp_path / "out", tmp_path / "clean", first_tasks(tmp_path / "tasks.jsonl", 2)
    rules = ["trial.agent=mortal_agent:run", "trial.max_restarts=0", "trial.group_size=2"]
    rules += ["trial.on_lost_member=complete", "trial.max_replacements=2"]

    def replacing(directory: Path) -> bool:
        return any(event["trial"] == "q01.1.r1" for event in events(directory, "trial.opened"))

    kill(replacing, out, *settings(tasks, speed=SLOW), *rules)
    rows = {row["trial_id"]: row for row in Past(out).listed()["trials"]}
    assert (rows["q01.1"]["outcome"], rows["q01.1.r1"]["state"]) == ("infra_exhausted", "unfinished")
    code, err = goes_on(out)
    assert code == 0, err
    with Command("run", "-c", CONFIG, "--output", str(undisturbed), *settings(tasks), *rules, mark="clean") as command:
        code, err = command.ended()
    assert code == 0, err
    assert data(out) == data(undisturbed)
    decided = sorted(lines(out / "groups.jsonl"), key=lambda line: line["group_id"])
    assert decided == sorted(lines(undisturbed / "groups.jsonl"), key=lambda line: line["group_id"])
    assert [(line["status"], line["trials"], line["lost"]) for line in decided] == [
        ("completed", ["q01.0", "q01.1.r1"], ["q01.1"]), ("whole", ["q02.0", "q02.1"], []),
    ]  # fmt: skip
    assert {line["trial_id"]: line["attempts"] for line in lines(out / "trials.jsonl")}["q01.1.r1"] == 2
    assert json.loads((out / "summary.json").read_text())["groups"] == {"completed": 1, "whole": 1, "undecided": 0}
    past = Past(out)
    done = past.export(tmp_path / "x", [], unfinished=False)
    assert past.samples(tmp_path / "x", done["exported"])["left_out"] == ["q01.1"]
