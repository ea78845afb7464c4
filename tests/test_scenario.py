"""The demo's plan of faults."""

from __future__ import annotations

import pytest

from rollout_ft.testing.faults import Kind
from rollout_ft.testing.scenario import plan
from rollout_ft.trial.tasks import quickstart, read_tasks

TASKS = read_tasks(quickstart())


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_made_by_its_seed_and_no_trial_has_two_faults(seed: int):
    faults = plan(TASKS, seed)
    assert faults == plan(TASKS, seed)
    assert len({fault.trial_id for fault in faults}) == len(faults)
    assert {fault.kind for fault in faults} == {
        Kind.SLOW, Kind.CUT, Kind.AGENT_KILL, Kind.ENGINE_KILL, Kind.ENGINE_FREEZE, Kind.ACTOR_KILL, Kind.STORE_KILL,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_half_of_the_clients_that_wait_too_short_do_not_say_so(seed: int):
    tasks = {task["task_id"]: task for task in TASKS}
    hidden = [bool(tasks[fault.trial_id].get("hide_timeout")) for fault in plan(TASKS, seed) if fault.kind is Kind.SLOW]
    assert sum(hidden) == len(hidden) / 2


@pytest.mark.parametrize("seed", range(20))
def test_lost_replies_fall_on_first_turns_and_on_later_ones(seed: int):
    for kind in (Kind.SLOW, Kind.CUT):
        turns = [fault.turn for fault in plan(TASKS, seed) if fault.kind is kind]
        assert turns.count(1) == len(turns) / 2
