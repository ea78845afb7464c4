"""What faults did to a run, and what a run that loses trials lacks."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rollout_ft.cli.main import app
from rollout_ft.cli.report import read, write
from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.bias import HEAD, QUANTITIES, between, grouped, rows_between, rows_within, within
from rollout_ft.trial.groups import GroupResult
from rollout_ft.trial.runner import TrialResult


def result(
    n: int, *, tokens: int = 100, seconds: float = 10.0, reward: float | None = 1.0, survived: int = 0, lost: bool = False
) -> TrialResult:
    outcome = "infra_exhausted" if lost else "completed"
    return TrialResult(f"t{n}", f"t{n}", outcome, None if lost else reward, "", 1, 3, survived, tokens + 5, 0, 5, seconds)


RESULTS = st.lists(
    st.builds(
        lambda tokens, survived, lost: {"tokens": tokens, "survived": survived, "lost": lost},
        st.integers(0, 5000), st.integers(0, 2), st.booleans(),
    ),
    max_size=30,
)  # fmt: skip


def some(rows: list[dict[str, Any]]) -> list[TrialResult]:
    return [result(n, **row) for n, row in enumerate(rows)]


def test_a_bias_that_is_there_is_seen_and_one_that_is_not_is_none():
    rng = random.Random(5)
    lengths = [round(rng.gauss(1000, 100)) for _ in range(400)]
    longer = within(result(n, tokens=length + 80 * (n % 2), survived=n % 2) for n, length in enumerate(lengths))
    same = within(result(n, tokens=length, survived=n % 2) for n, length in enumerate(lengths))
    assert longer["difference"]["tokens"]["low"] > 0
    assert same["difference"]["tokens"]["low"] < 0 < same["difference"]["tokens"]["high"]


def test_the_interval_is_welchs():
    apart = within([result(0, tokens=2, survived=1), result(1, tokens=4, survived=1), result(2, tokens=1), result(3, tokens=7)])
    error = math.sqrt(2 / 2 + 18 / 2)
    assert apart["difference"]["tokens"] == {
        "mean": -1.0,
        "low": pytest.approx(-1 - 1.96 * error),
        "high": pytest.approx(-1 + 1.96 * error),
    }


def test_what_a_run_lost_is_measured_on_the_run_that_kept_it():
    """Long trials are what timeouts lose."""
    kept = [result(n, tokens=1000 if n < 4 else 100, reward=0.0 if n < 4 else 1.0) for n in range(10)]
    other = [result(n, lost=n < 4) for n in range(10)]
    found = between(kept, other)
    assert (found["reference"]["trials"], found["lost"]["trials"], found["lost"]["tokens"]) == (6, 4, 1000)
    assert (found["missing"]["tokens"]["mean"], found["missing"]["reward"]["mean"]) == (900, -1)
    assert found["difference"]["tokens"] == {"mean": 0, "low": 0, "high": 0}


def test_runs_of_the_same_trials_are_compared_pair_by_pair():
    """Trials differ by far more than the runs do."""
    reference = [result(n, seconds=100.0 * n) for n in range(20)]
    other = [result(n, seconds=100.0 * n + 3 + 0.1 * (n % 3)) for n in range(21)]
    found = between(reference, other)
    assert 3 < found["difference"]["seconds"]["low"] < found["difference"]["seconds"]["high"] < 3.2
    assert found["elsewhere"] == 1


@given(RESULTS)
def test_every_trial_is_counted_once(rows: list[dict[str, Any]]):
    found = within(some(rows))
    assert found["met"]["trials"] + found["clean"]["trials"] + found["lost"] == len(rows)


@given(RESULTS, RESULTS)
def test_what_is_shown_of_any_runs_has_a_cell_for_every_column(one: list[dict[str, Any]], other: list[dict[str, Any]]):
    shown = [*rows_within(within(some(one))), *rows_between(between(some(one), some(other)), "a", "b")]
    assert {len(row) for row in shown} == {len(HEAD)}


@given(RESULTS)
def test_a_run_does_not_differ_from_itself(rows: list[dict[str, Any]]):
    found = between(some(rows), some(rows))
    assert (found["lost"]["trials"], found["elsewhere"]) == (0, 0)
    assert all(found["difference"][q]["mean"] in (0, None) for q in QUANTITIES)


def written(directory: Path, results: list[TrialResult]) -> Path:
    directory.mkdir()
    (directory / "trials.jsonl").write_text("".join(json.dumps(r.line()) + "\n" for r in results))
    return directory


def test_the_command_says_what_a_policy_lost(tmp_path: Path):
    kept = written(tmp_path / "resume", [result(n, tokens=1000 if n < 2 else 100, survived=n < 2) for n in range(8)])
    abandoned = written(tmp_path / "abandon", [result(n, lost=n < 2) for n in range(8)])
    shown = CliRunner().invoke(app, ["report", str(kept), str(abandoned)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert "less those kept" in shown.output
    found = json.loads(CliRunner().invoke(app, ["report", str(kept), str(abandoned), "--json"]).output)
    assert found["runs"][str(kept)]["difference"]["tokens"]["mean"] == 900
    assert found["beside"][str(abandoned)]["missing"]["tokens"]["mean"] == 900


def test_what_dropping_groups_takes_from_the_batch_is_measured(tmp_path: Path):
    """Long tasks meet more faults, and their groups are what is dropped."""
    ended = [result(n, tokens=1000 if n < 4 else 100, lost=n < 2) for n in range(8)]
    results = [replace(r, group_id="long" if n < 4 else "short") for n, r in enumerate(ended)]
    groups = [GroupResult("long", "dropped", [], ["t0"], []), GroupResult("short", "whole", ["t4", "t5", "t6", "t7"], [], [1.0] * 4)]
    found = grouped(results, groups)
    assert (found["groups"], found["counted"]["trials"], found["left_out"]["trials"]) == ({"dropped": 1, "whole": 1}, 4, 2)
    assert found["difference"]["tokens"]["mean"] == 900
    directory = written(tmp_path / "run", results)
    (directory / "groups.jsonl").write_text("".join(json.dumps(group.line()) + "\n" for group in groups))
    assert json.loads(CliRunner().invoke(app, ["report", str(directory), "--json"]).output)["groups"] == {str(directory): found}
    shown = CliRunner().invoke(app, ["report", str(directory)], env={"COLUMNS": "160"})
    assert "group dropped" in shown.output
    page = write(read([directory])).read_text()
    assert '<td class="text">long</td><td>dropped</td><td>0</td><td>t0</td>' in page


def test_a_directory_without_results_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none/trials\.jsonl is not there"):
        read([tmp_path / "none"])
    with pytest.raises(ConfigError, match="has no result yet"):
        read([written(tmp_path / "empty", [])])
    with pytest.raises(ConfigError, match="named twice"):
        read([tmp_path, tmp_path])


def test_the_page_of_a_run_has_the_comparison(tmp_path: Path):
    page = write(read([written(tmp_path / "run", [result(0, survived=1), result(1)])])).read_text()
    assert '<td class="text">met a fault</td><td>1</td>' in page
