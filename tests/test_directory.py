"""A run's directory: which run is in it, who may go on with it, and under which config."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_ft.checkpoint.journal import Journal
from rollout_ft.cli.directory import DOUBTFUL, LOCK_AGAIN_S, SAMPLED_BY, create, held, reopen, saved_config, with_journal
from rollout_ft.cli.output import Output
from rollout_ft.config import Config, TrialConfig, known_keys
from rollout_ft.errors import ConfigError
from rollout_ft.trial.board import Board
from rollout_ft.trial.runner import TrialResult
from rollout_ft.trial.siblings import plays

TASKS = [{"task_id": "a"}, {"task_id": "b"}]


def config(**changed: Any) -> Config:
    return Config.model_validate({"trial": {"agent": "a:b", "tasks": "gone.jsonl"}} | changed)


def left(path: Path) -> None:
    """A run that was started here by a process that is gone."""
    code = "import sys, test_directory as t; from pathlib import Path; t.create(Path(sys.argv[1]), t.config(), t.TASKS)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})


def test_who_goes_on_has_the_same_secret_tasks_and_config(tmp_path: Path):
    left(tmp_path / "run")
    secret = (tmp_path / "run" / "secret").read_text()
    again = reopen(tmp_path / "run", saved_config(tmp_path / "run"))
    assert (again.secret, again.tasks, again.config, again.resumed) == (secret, TASKS, config(), True)


def test_secret_and_config_are_for_their_user_alone(tmp_path: Path):
    left(tmp_path)
    assert {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("secret", "config.json")} == {"secret": 0o600, "config.json": 0o600}
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        reopen(tmp_path, config())


def test_a_directory_has_one_process_at_a_time(tmp_path: Path):
    create(tmp_path, config(), TASKS)
    with pytest.raises(ConfigError, match="another process"):
        reopen(tmp_path, config())


HOLD = """
import sys, test_directory as t; from pathlib import Path
t.create(Path(sys.argv[1]), t.config(), t.TASKS)
print("held", flush=True); sys.stdin.read()
"""


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """A run was started here, by a process that lives."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


def test_a_directory_is_held_while_the_process_lives_that_has_its_run_and_asking_takes_nothing(tmp_path: Path):
    assert not held(tmp_path)
    with holding(tmp_path / "run"):
        assert held(tmp_path / "run")
        assert held(tmp_path / "run")
    assert not held(tmp_path / "run")
    reopen(tmp_path / "run", config())


def test_who_asks_at_the_moment_a_run_is_gone_on_with_does_not_stop_it(tmp_path: Path):
    left(tmp_path)
    with (tmp_path / "lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        threading.Timer(LOCK_AGAIN_S / 2, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        assert reopen(tmp_path, config()).resumed


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"trial": {"agent": "a:b", "tasks": "gone.jsonl", "group_size": 2}}, "trial.group_size"),
        ({"trial": {"agent": "a:b", "tasks": "gone.jsonl", "on_lost_member": "drop"}}, "trial.on_lost_member"),
        ({"model": {"context_tokens": 1 << 16}}, "model.context_tokens"),
        ({"model": {"experts": {"layers": 1, "topk": 1, "count": 2}}}, "model.experts"),
        ({"sampling": {"parameters": {"temperature": 0.5}}}, "sampling.parameters"),
        ({"store": {"journal_dir": "/elsewhere"}}, "store.journal_dir"),
        ({"trial": {"agent": "a:c", "tasks": "gone.jsonl"}}, "trial.agent"),
    ],
)
def test_what_makes_the_data_may_not_change_and_is_named(tmp_path: Path, changed: Any, key: str):
    left(tmp_path)
    with pytest.raises(ConfigError, match=f"^{key}: "):
        reopen(tmp_path, config(**changed))
    assert saved_config(tmp_path) == config()


def test_what_does_not_make_the_data_may_change_and_is_kept(tmp_path: Path):
    left(tmp_path)
    new = config(engine={"count": 8, "args": ["--x"]}, orphan_s=9, store={"replicas": 1})
    assert [w.split(" ")[0] for w in reopen(tmp_path, new).warnings] == ["engine.args"]
    assert saved_config(tmp_path) == new


def test_other_tasks_are_refused(tmp_path: Path):
    left(tmp_path / "run")
    (tmp_path / "same").write_text('{"task_id": "a"}\n\n{"task_id":"b"}\n')
    (tmp_path / "other").write_text('{"task_id": "a"}\n')
    with pytest.raises(ConfigError, match=r"^trial\.tasks: "):
        reopen(tmp_path / "run", config(trial={"agent": "a:b", "tasks": str(tmp_path / "other")}))


def test_results_without_a_run_are_not_gone_on_with(tmp_path: Path):
    (tmp_path / "trials.jsonl").touch()
    with pytest.raises(ConfigError, match="empty directory"):
        create(tmp_path, config(), TASKS)


def test_the_journal_is_in_the_directory_unless_it_is_named_and_its_path_means_the_same_everywhere(tmp_path: Path):
    assert with_journal(config(), tmp_path).store.journal_dir == str(tmp_path / "journal")
    assert with_journal(config(store={"journal_dir": "here"}), tmp_path).store.journal_dir == str(Path("here").absolute())
    assert with_journal(config(store={"journal_dir": "none"}), tmp_path).store.journal_dir == "none"


def test_every_key_that_is_judged_exists():
    assert {*SAMPLED_BY, *DOUBTFUL} <= set(known_keys())


# -- what is written ----------------------------------------------------------------------------------------------


def result(trial_id: str) -> TrialResult:
    return TrialResult(trial_id, trial_id, "completed", 1.0, "", 1, 1, 0, 4, 0, 0, 1.0)


def output(path: Path, tasks: list[dict[str, Any]] = TASKS, **rules: Any) -> Output:
    return Output(path, Board(plays(tasks, TrialConfig(**rules)), TrialConfig(**rules)), 2**20)


def trajectory(trial_id: str) -> dict[str, Any]:
    return {"trial_id": trial_id, "paths": [{"token_ids": [1], "loss_mask": [1], "logprobs": [0.5]}]}


def test_a_torn_line_is_owed_and_what_follows_it_is_not_glued_to_it(tmp_path: Path):
    first = output(tmp_path)
    for name in ("a", "b"):
        first.trial(result(name), trajectory(name))
    first.close()
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole[:-9])
    second = output(tmp_path)
    assert set(second.results) == {"a"}
    second.trial(result("b"), {"released": True})
    second.close()
    assert (tmp_path / "trials.jsonl").read_bytes() == whole


def test_a_trial_whose_trajectory_is_gone_is_owed(tmp_path: Path):
    first = output(tmp_path)
    for name in ("a", "b"):
        first.trial(result(name), trajectory(name))
    (tmp_path / "trajectories" / "a.safetensors").unlink()
    again = output(tmp_path)
    assert set(again.results) == {"b"}
    again.trial(result("a"), {"released": True})
    assert [lost.trial_id for lost in again.lost] == ["a"]


def test_lines_that_are_none_and_second_lines_of_a_trial_are_taken_out(tmp_path: Path):
    first = output(tmp_path)
    first.trial(result("a"), trajectory("a"))
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole + b"\0\0\0\n" + whole + b'{"trial_id": "a"}\n')
    assert set(output(tmp_path).results) == {"a"}
    assert (tmp_path / "trials.jsonl").read_bytes() == whole


def test_a_trial_without_a_recorded_outcome_has_no_line(tmp_path: Path):
    written = output(tmp_path)
    written.trial(TrialResult("a", "a", "infra_exhausted", None, "unreachable", 0, 0, 0, 0, 0, 0, 0.0), {"paths": []})
    assert written.summary(1.0)["unfinished"] == 2
    assert not (tmp_path / "trials.jsonl").read_bytes()


def test_the_seconds_of_all_processes_are_counted(tmp_path: Path):
    assert output(tmp_path).summary(1.5)["seconds"] == 1.5
    assert output(tmp_path).summary(2.0)["seconds"] == 3.5


def test_the_seconds_of_a_process_that_was_killed_are_those_of_its_events(tmp_path: Path):
    events = [
        {"time": 100.0, "event": "run.started", "gateway_url": "http://127.0.0.1:1"},
        {"time": 237.6, "event": "engine.up", "engine": "e"},
        {"time": 400.0, "event": "run.resumed"},
        {"time": 412.0, "event": "run.started", "gateway_url": "http://127.0.0.1:1"},
        {"time": 422.0, "event": "engine.up", "engine": "e"},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    third = output(tmp_path)
    third.event({"time": 900.0, "event": "run.started", "source": "run", "gateway_url": "http://127.0.0.1:1"})
    third.event({"time": 999.0, "event": "engine.up", "source": "run", "engine": "e"})
    assert third.summary(89.4)["seconds"] == 137.6 + 10.0 + 89.4


@pytest.mark.parametrize("left", [b"", b'{"trials": 2, "outc', b"[]", b"\0\0\0"])
def test_a_torn_summary_is_none_and_is_written_when_the_run_is_gone_on_with(tmp_path: Path, left: bytes):
    first = output(tmp_path)
    for name in ("a", "b"):
        first.trial(result(name), trajectory(name))
    made = first.summary(1.0)
    assert output(tmp_path).complete()
    (tmp_path / "summary.json").write_bytes(left)
    again = output(tmp_path)
    assert not again.complete()
    assert again.summary(1.0) == made == json.loads((tmp_path / "summary.json").read_bytes())


def test_what_is_under_way_and_what_was_restarted_is_known_from_events_and_what_has_a_result_is_not_under_way(tmp_path: Path):
    def told(name: str, trial: str, **more: Any) -> dict[str, Any]:
        return {"time": 1.0, "event": name, "source": "run", "trial": trial, **more}

    first = output(tmp_path)
    for event in (told("trial.opened", "a"), told("trial.opened", "b"), told("trial.restarted", "b", attempt=2, reason="infra")):
        first.event(event)
    assert (first.running, first.restarts, first.done) == (2, 1, 0)
    first.trial(result("a"), trajectory("a"))
    assert (first.running, first.restarts, first.done) == (1, 1, 1)
    first.close()
    assert (output(tmp_path).running, output(tmp_path).restarts) == (1, 0)


# -- groups -------------------------------------------------------------------------------------------------------

GROUP: list[dict[str, Any]] = [{"task_id": "a"}]
RULES: dict[str, Any] = {"group_size": 3, "on_lost_member": "complete", "max_replacements": 1}
ENDS = [result("a.0"), replace(result("a.1"), outcome="infra_exhausted", reward=None), result("a.2"), result("a.1.r1")]
LINE = {"group_id": "a", "status": "completed", "trials": ["a.0", "a.1.r1", "a.2"], "lost": ["a.1"], "rewards": [1.0, 1.0, 1.0]}


def groups(path: Path) -> list[Any]:
    return [json.loads(line) for line in (path / "groups.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", range(5))
def test_a_group_has_its_line_once_wherever_a_process_was_killed(tmp_path: Path, stop: int):
    first = output(tmp_path, GROUP, **RULES)
    for end in ENDS[:stop]:
        first.trial(end, trajectory(end.trial_id))
    assert groups(tmp_path) == [LINE][: stop // 4]
    second = output(tmp_path, GROUP, **RULES)
    assert second.owed == 3 - stop + (stop > 1)
    for end in ENDS[stop:]:
        second.trial(end, trajectory(end.trial_id))
    assert (groups(tmp_path), second.owed, second.replaced) == ([LINE], 0, {"a.1"})
    assert second.summary(1.0)["groups"] == {"completed": 1, "undecided": 0}


@pytest.mark.parametrize("left", [b"", b'{"group_id": "a", "status"', b'{"group_id": "zzz"}\n', None])
def test_lines_of_groups_are_made_again_from_those_of_their_trials(tmp_path: Path, left: bytes | None):
    first = output(tmp_path, GROUP, **RULES)
    for end in ENDS:
        first.trial(end, trajectory(end.trial_id))
    if left is None:
        (tmp_path / "groups.jsonl").unlink()
    else:
        (tmp_path / "groups.jsonl").write_bytes(left)
    output(tmp_path, GROUP, **RULES)
    assert groups(tmp_path) == [LINE]


def test_a_group_that_waits_for_a_trial_without_a_recorded_outcome_has_no_line(tmp_path: Path):
    written = output(tmp_path, GROUP, group_size=2)
    written.trial(result("a.0"), trajectory("a.0"))
    written.trial(replace(result("a.1"), outcome="infra_exhausted", reward=None, attempts=0), {"paths": []})
    assert (groups(tmp_path), written.owed) == ([], 1)
    assert written.summary(1.0)["groups"] == {"undecided": 1}


def test_the_trials_of_a_dropped_group_that_were_not_begun_are_not_owed(tmp_path: Path):
    written = output(tmp_path, GROUP, group_size=3, on_lost_member="drop")
    written.trial(replace(result("a.1"), outcome="infra_exhausted", reward=None), trajectory("a.1"))
    assert [line["status"] for line in groups(tmp_path)] == ["dropped"]
    assert (written.owed, written.summary(1.0)["unfinished"]) == (0, 0)
    assert written.complete()


def test_a_run_without_groups_writes_nothing_of_them(tmp_path: Path):
    written = output(tmp_path)
    written.trial(result("a"), trajectory("a"))
    assert "groups" not in written.summary(1.0)
    assert not (tmp_path / "groups.jsonl").exists()


def test_the_last_view_is_the_highest_that_was_heard_of(tmp_path: Path):
    (tmp_path / "events.jsonl").write_text('{"event": "view.opened", "number": 3}\n{"event": "x"}\n{"event": "view.opened", "num')
    assert output(tmp_path).last_view() == 3


def test_tasks_that_moved_are_the_same_tasks(tmp_path: Path):
    left(tmp_path / "run")
    (tmp_path / "same").write_text('{"task_id": "a"}\n\n{"task_id":"b"}\n')
    moved = config(trial={"agent": "a:b", "tasks": str(tmp_path / "same")})
    assert reopen(tmp_path / "run", moved).tasks == TASKS


def test_a_new_run_does_not_begin_with_the_journal_of_another(tmp_path: Path):
    where = {"store": {"journal_dir": str(tmp_path / "j")}}
    Journal(tmp_path / "j", "run/store-0/1").close()
    with pytest.raises(ConfigError, match=r"store\.journal_dir: .* of a run called run"):
        create(tmp_path / "a", config(**where), TASKS)
    create(tmp_path / "b", config(**where, run="other"), TASKS)
