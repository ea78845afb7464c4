"""What a run says of itself is compared: what agrees, what does not, and what nothing tells the end of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from test_account import ended, event, moved, opened
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
EVENTS = [each for r in RESULTS for each in (opened(r.trial_id), end(r))]
COUNTERS = {
    "rollout_ft/trials_finished": 3.0, "rollout_ft/tokens_generated": 50.0, "rollout_ft/tokens_reused": 3.0,
    "rollout_ft/tokens_wasted": 34.0,
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
def test_counters_that_began_anew_are_left_out_with_the_reason(met: str):
    made = audited([*EVENTS, event(met)], counters=COUNTERS | {"rollout_ft/tokens_generated": 1.0})
    assert (made.wrong, len(made.notes)) == ([], 1)


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
