"""Steps of a trial's environment, as its session and its store have them."""

from __future__ import annotations

import pytest

from rollout_ft.cli.transcript import text, transcript
from rollout_ft.errors import BadRequest
from rollout_ft.session.entries import decode_entry, encode_entry
from rollout_ft.session.steps import Steps
from rollout_ft.types import Opened, SessionSpec, Step


def step(number: int, attempt: int = 1, result: bytes = b"{}") -> Step:
    return Step(attempt, number, b'{"do":1}', result)


def test_the_first_that_is_recorded_as_a_step_of_an_attempt_stands():
    steps = Steps(10)
    steps.add(step(1, result=b'{"a":1}'))
    assert steps.known(step(1, result=b'{"b":1}')) == step(1, result=b'{"a":1}')
    assert steps.known(step(1, attempt=2)) is None
    assert steps.known(step(2)) is None


def test_a_turn_knows_the_steps_that_were_recorded_before_it():
    steps = Steps(10)
    steps.turn("first")
    steps.add(step(1))
    steps.add(step(2))
    steps.turn("second")
    steps.add(step(3))
    assert [steps.before(key) for key in ("first", "second", "nobody's")] == [0, 2, 0]


def test_a_trial_has_no_more_steps_than_the_config_allows():
    steps = Steps(1)
    steps.add(step(1))
    assert steps.known(step(1)) is not None
    with pytest.raises(BadRequest, match=r"session\.max_steps"):
        steps.known(step(2))


def test_a_step_comes_back_from_the_store_as_it_was():
    entry = Step(3, 7, b'{"a":"\xc3\xa9"}', b"{}", "snapshot-1")
    assert decode_entry(*encode_entry(entry)) == entry


def test_a_transcript_shows_what_the_environment_did():
    opened = Opened(SessionSpec("t"), 1, True, 0)
    shown = transcript([opened, Step(1, 1, b'{"command":"ls"}', b'{"output":"a.txt"}', "snapshot-1")])
    assert shown[0]["turns"] == [
        {"how": "step", "number": 1, "action": {"command": "ls"}, "result": {"output": "a.txt"}, "snapshot": "snapshot-1"}
    ]
    assert list(text(shown))[1:] == ['  step 1 of the environment: {"command":"ls"}, saved', '    {"output":"a.txt"}']
