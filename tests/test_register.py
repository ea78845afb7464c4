"""What is known of every trial: from transitions, and from the store where nobody was there for them."""

from __future__ import annotations

import orjson

from rollout_ft.checkpoint.log import Head
from rollout_ft.checkpoint.ports import Outline
from rollout_ft.fleet import register as module
from rollout_ft.fleet.register import Register
from rollout_ft.session.entries import encode_entry
from rollout_ft.types import JSON, Ended, Opened, Outcome, SessionSpec

SPEC = SessionSpec("t1", task_id="q", group_id="g")
ENDED: JSON = {"trial_id": "t1", "attempt": 2, "task_id": "q", "group_id": "g", "mode": "train", "outcome": "completed", "reward": 1.0,
               "cause": ""}  # fmt: skip


def head(attempt: int = 1, length: int = 3, **more: bool) -> Head:
    return Head(attempt, 1, length, b"", **more)


def test_a_trial_is_known_from_its_opening_to_its_release():
    register = Register()
    register.opened(SPEC)
    register.restarted("t1", 2)
    register.ended(ENDED)
    register.released("t1")
    row = register.rows["t1"]
    assert (row.task_id, row.group_id, row.attempt, row.outcome, row.reward, row.released) == ("q", "g", 2, "completed", 1.0, True)
    assert register.unknown() == []


def test_what_only_the_store_knows_is_asked_for_once():
    register = Register()
    register.take({"t1": head(), "t2": head(released=True), "t3": head(damaged=True)}, [])
    assert register.unknown() == ["t1", "t2"]
    ended = encode_entry(Ended(Outcome.ENV_FAILED, None, "no sandbox", 5))[1]
    note = orjson.dumps(ENDED | {"trial_id": "t2"})
    register.learn({"t1": Outline(encode_entry(Opened(SPEC, 1, False, 1))[1], ended), "t2": Outline(note=note)})
    assert register.unknown() == []
    assert [(register.rows[t].group_id, register.rows[t].outcome) for t in ("t1", "t2")] == [("g", "env_failed"), ("g", "completed")]


def test_a_list_that_was_made_before_takes_nothing_back():
    register = Register()
    register.opened(SPEC)
    old = {"t1": head()}
    register.restarted("t1", 2)
    register.released("t1")
    register.take(old, ["t1"])
    assert (register.rows["t1"].attempt, register.rows["t1"].released) == (2, True)


def test_a_trial_that_the_store_has_forgotten_is_forgotten_and_one_that_is_new_is_not():
    register = Register()
    register.take({"old": head(released=True)}, [])
    before = list(register.rows)
    register.opened(SPEC)
    register.take({}, before)
    assert list(register.rows) == ["t1"]
    register.take({}, list(register.rows))
    assert not register.rows


def test_another_life_of_a_name_begins_with_nothing():
    register = Register()
    register.opened(SPEC)
    register.ended(ENDED)
    register.released("t1")
    register.opened(SPEC)
    assert (register.rows["t1"].attempt, register.rows["t1"].outcome, register.rows["t1"].released) == (1, "", False)


def test_rows_are_bounded_between_two_looks(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    register = Register()
    for i in range(5):
        register.opened(SessionSpec(f"t{i}"))
    assert list(register.rows) == ["t2", "t3", "t4"]


def test_what_the_store_has_forgotten_is_still_counted_and_once():
    register = Register()
    register.opened(SPEC)
    register.ended(ENDED)
    register.take({}, ["t1"])
    register.take({}, ["t1"])
    register.opened(SPEC)
    register.take({}, ["t1"])
    assert (register.rows, register.outcomes, register.restarts) == ({}, {"completed": 1}, 1)
