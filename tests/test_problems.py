"""What somebody is told who was woken up: every bad state, once, with what to do."""

from __future__ import annotations

from typing import Any

import pytest
from test_status import NOW, WEIGHTS, engine, fleet

from rollout_ft.fleet.health import State
from rollout_ft.fleet.spread import exposed
from rollout_ft.telemetry.problems import problems
from rollout_ft.types import JSON

LOSS = {"engine": "engine-0", "incarnation": 1, "time": NOW - 60, "reason": "killed by SIGKILL (out of memory)"}


def told(seen: JSON, **more: Any) -> list[JSON]:
    return problems(seen, NOW, **more)


def test_a_run_in_which_nothing_is_wrong_has_no_problem():
    assert told(fleet()) == []


@pytest.mark.parametrize("state", [State.DEAD, State.SUSPECT, State.STALE, State.OFFLOADED, State.RESTARTING])
def test_every_bad_state_of_an_engine_is_a_problem_with_something_to_do(state: State):
    (problem,) = told(fleet(engine(0), engine(1, state.value, reason="stalled: no token of any of its 3 calls for 4.0 s")))
    assert "engine-1" in problem["what"]
    assert state.value in problem["what"]
    assert problem["remedy"]


def test_a_reason_that_is_explained_brings_its_own_remedy():
    (problem,) = told(fleet(engine(0), engine(1, "dead", reason="killed by SIGKILL")))
    assert problem["level"] == "bad"
    assert "mem-fraction-static" in problem["remedy"]
    assert "the log that it names" in problem["remedy"]


def test_a_thousand_engines_with_the_same_problem_are_one():
    many = [engine(i, "dead", reason=f"stalled: no token for {i} s", sessions=2) for i in range(1000)]
    problem, *_ = [each for each in told(fleet(engine(2000), *many)) if "dead" in each["what"]]
    assert problem["what"] == "engine-0, engine-1, engine-2 and 997 more are dead; 2,000 sessions are there."
    assert len(told(fleet(engine(2000), *many))) == 1


def test_what_keeps_every_turn_waiting_comes_first():
    view = {"number": 2, "members": [], "min_replicas": 1}
    found = told(fleet(engine(0, "stale", stale="missed v4"), view=view, warnings=["something"]))
    assert [each["level"] for each in found] == ["bad", "bad", "warn", "warn"]
    assert "no fewer than 1" in found[0]["what"]
    assert "none serves" in found[1]["what"]


def test_every_warning_of_the_fleet_has_something_to_do():
    for warning in [
        *(exposed({"s1": "n", "s2": "n"}, journal=journal) for journal in (False, True)), exposed({"s1": "n"}, journal=True),
        "engine-1 is stale and serves nothing (missed v4): the trainer's next update brings it back (POST /fleet/weights)", "another",
    ]:  # fmt: skip
        (problem,) = told(fleet(warnings=[warning]))
        assert problem["remedy"], warning
        assert ("store.journal_dir" in problem["remedy"]) == ("checkpoint store" in warning)


def test_a_pause_says_how_long_it_has_lasted_and_what_ends_it():
    weights = WEIGHTS | {"phase": "paused", "still_since": NOW - 90}
    (problem,) = told(fleet(weights=weights))
    assert "paused for 90 s" in problem["what"]
    assert "/fleet/resume" in problem["remedy"]


def test_engines_whose_memory_the_trainer_took_are_no_problem_of_their_own():
    weights = WEIGHTS | {"phase": "offloaded", "still_since": NOW - 5}
    assert len(told(fleet(engine(0, "offloaded"), engine(1, "offloaded"), weights=weights))) == 1


def test_an_engine_that_was_lost_and_serves_again_is_told_of_for_a_while():
    (problem,) = told(fleet(), recoveries=[LOSS, LOSS])
    assert "engine-0 was lost 2 times" in problem["what"]
    assert told(fleet(), recoveries=[LOSS | {"time": NOW - 6000}]) == []


def test_an_engine_that_died_too_often_is_a_problem_and_one_that_was_drained_is_not():
    often = "exited 1; it died more than 3 times in 600 s (engine.max_restarts)"
    (problem,) = told(fleet(engine(0), engine(1, "retired", reason=often), engine(2, "retired", reason="drained")))
    assert problem["what"] == "engine-1 is retired."
