"""What a run says of itself is compared: what agrees, what does not, and what nothing tells the end of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from test_account import ended, event, moved, opened, restarted
from typer.testing import CliRunner

from rollout_ft.cli.main import app
from rollout_ft.cli.output import Output
from rollout_ft.config import TrialConfig
from rollout_ft.telemetry.account import account
from rollout_ft.telemetry.audit import Audit, audit
from rollout_ft.telemetry.figures import totals
from rollout_ft.trial.board import Board
from rollout_ft.trial.runner import TrialResult
from rollout_ft.trial.siblings import plays
from rollout_ft.types import JSON


def result(trial: str, outcome: str = "completed", attempts: int = 1, generated: int = 10, wasted: int = 2) -> TrialResult:
    return TrialResult(trial, trial, outcome, 1.0, "", attempts, 3, 0, generated, 1, wasted, 1.0)


def end(of: TrialResult) -> JSON:
    sums = {name: getattr(of, name) for name in ("attempts", "turns", "tokens_generated", "tokens_reused", "tokens_wasted")}
    return ended(of.trial_id, of.outcome, **sums)


RESULTS = [result("a"), result("b", "infra_exhausted", 4, 30, 30), result("c", "truncated")]
EVENTS = [
    each for r in RESULTS for each in (opened(r.trial_id), *(restarted(r.trial_id, n) for n in range(2, r.attempts + 1)), end(r))
]  # fmt: skip
LAST_SECOND = "of the last second before a supervisor or the run's process was lost events may be missing, and so may faults"
COUNTERS = {
    "rollout_ft/trials_finished": 3.0, "rollout_ft/tokens_generated": 50.0, "rollout_ft/tokens_reused": 3.0,
    "rollout_ft/tokens_wasted": 34.0, "rollout_ft/attempts_restarted": 3.0,
    **{f"rollout_ft/trials_finished/{outcome}": 1.0 for outcome in ("completed", "infra_exhausted", "truncated")},
}  # fmt: skip


def audited(events: list[JSON] = EVENTS, results: list[TrialResult] = RESULTS, **changed: Any) -> Audit:
    summary = totals(results) | changed.pop("summary", {})
    return audit(account(events), results, summary, changed.pop("counters", COUNTERS))


def test_a_run_whose_records_agree_has_nothing_wrong():
    made = audited()
    assert (made.wrong, made.notes) == ([], [])
    assert made.figures["tokens_generated"] == {"events": 50, "trials": 50, "summary": 50, "counters": 50}


@pytest.mark.parametrize("name", ["tokens_generated", "tokens_reused", "tokens_wasted"])
def test_one_token_too_many_in_any_of_them_is_seen(name: str):
    said = COUNTERS[f"rollout_ft/{name}"]
    assert audited(counters=COUNTERS | {f"rollout_ft/{name}": said + 1}).wrong
    assert audited(summary={name: int(said) + 1}).wrong
    assert audited([*EVENTS[:-1], {**EVENTS[-1], name: EVENTS[-1][name] + 1}]).wrong


def test_what_no_event_tells_the_end_of_is_named():
    made = audited([*EVENTS, opened("d"), opened("e"), moved("e~1", 2)])
    assert [line.split(",")[0] for line in made.wrong] == ["trial d was opened", "trial e was opened", "session e~1 was taken over"]


def test_events_that_are_missing_are_said():
    told = [{**each, "seq": number} for number, each in enumerate(EVENTS, 2)]
    assert audited(told).wrong == ["1 events are missing: their numbers are left out"]


@pytest.mark.parametrize("met", ["run.resumed", "supervisor.rebuilt"])
def test_counters_that_began_anew_are_left_out_with_the_reason_and_what_nobody_knows_is_said(met: str):
    made = audited([*EVENTS, event(met)], counters=COUNTERS | {"rollout_ft/tokens_generated": 1.0})
    assert made.wrong == []
    assert ("counters are left out" in made.notes[0], made.notes[1]) == (True, LAST_SECOND)
    assert [note.partition(": ")[2] for note in made.notes[2:]] == (["tokens_wasted is what is known"] if met == "run.resumed" else [])


def test_a_restart_that_no_event_tells_is_wrong_or_where_a_process_was_lost_a_note():
    untold = [each for each in EVENTS if each.get("attempt") != 3]
    assert audited(untold).wrong == ["restarts: events 2, trials 3, summary 3, counters 3"]
    made = audited([*untold, event("supervisor.rebuilt")])
    assert (made.wrong, made.notes[2:]) == ([], ["1 restart of attempts has no event"])
    assert audited([EVENTS[0], restarted("a", 2), *EVENTS[1:], event("supervisor.rebuilt")]).wrong == [
        "restarts: events 4, trials 3, summary 3"
    ]


def test_a_restart_of_a_trial_that_goes_on_is_none_of_those_that_ended():
    made = audited([*EVENTS, opened("d"), restarted("d", 2)], counters=COUNTERS | {"rollout_ft/attempts_restarted": 4.0})
    assert made.wrong == ["trial d was opened, and has no end"]


def test_a_start_of_an_engine_that_ended_with_its_supervisor_is_named():
    def starts(*numbers: int) -> list[JSON]:
        return [event(name, engine="engine-1", incarnation=n, reason="exited: 1") for n in numbers for name in ("engine.up", "engine.dead")]

    assert audited([*EVENTS, *starts(1, 2, 3)]).notes == []
    made = audited([*EVENTS, *starts(1), event("supervisor.rebuilt"), *starts(3, 1, 2)])  # the last two in another cluster
    assert (made.wrong, made.notes[1]) == ([], "start 2 of engine-1 has no event: it ended with the supervisor that saw it")
    assert len(made.notes) == 3


def test_a_run_that_counted_nothing_is_audited_without_counters():
    made = audited(counters={})
    assert (made.wrong, len(made.notes), made.figures["trials"]["counters"]) == ([], 1, None)


def test_a_trial_that_was_never_played_is_in_the_summary_alone():
    aside = TrialResult("d", "d", "cancelled", None, "not played", 0, 0, 0, 0, 0, 0, 0.0)
    assert audited(results=[*RESULTS, aside]).wrong == []


def directory(path: Path, *, told: bool = True) -> Path:
    """What a run leaves behind; `told`: whether the supervisor lived to tell the last end."""
    out = Output(path, Board(plays([{"task_id": r.trial_id} for r in RESULTS], TrialConfig()), TrialConfig()), 2**20)
    for each in EVENTS if told else EVENTS[:-1]:
        out.event(each)
    for each in RESULTS:
        (path / "trajectories" / f"{each.trial_id}.safetensors").touch()
        out.trial(each, {"released": True})
    out.counters(COUNTERS)
    out.summary(1.0)
    out.close()
    return path


@pytest.mark.parametrize("told", [True, False])
def test_an_end_that_died_with_the_supervisor_is_told_by_the_process_that_has_its_line(tmp_path: Path, told: bool):
    said = CliRunner().invoke(app, ["audit", str(directory(tmp_path, told=told)), "--json"])
    assert (said.exit_code, orjson.loads(said.stdout)["wrong"]) == (0, [])


def test_the_command_ends_with_1_where_something_is_wrong_and_says_what(tmp_path: Path):
    path = directory(tmp_path)
    summary = orjson.loads((path / "summary.json").read_bytes())
    (path / "summary.json").write_bytes(orjson.dumps(summary | {"turns": 8}))
    said = CliRunner().invoke(app, ["audit", str(path)])
    assert (said.exit_code, "turns: events 9, trials 9, summary 8" in said.stdout) == (1, True)


def test_a_run_that_is_not_over_has_no_audit(tmp_path: Path):
    path = directory(tmp_path)
    (path / "summary.json").unlink()
    said = CliRunner().invoke(app, ["audit", str(path)])
    assert said.exit_code != 0
