"""Which leniency it took to recognise a message, counted once a turn."""

from __future__ import annotations

import pytest
from conftest import ask, assistant, begin, play, user
from hypothesis import given
from test_matcher import MESSAGE

from rollout_ft.samples.trajectory import metadata
from rollout_ft.session.canonical import message_key
from rollout_ft.session.leniency import leniencies
from rollout_ft.session.session import Session
from rollout_ft.types import JSON

CALL: JSON = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAID: JSON = {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("sent", "needed"),
    [
        (SAID, set()),
        (dict(reversed(SAID.items())), set()),
        ({**SAID, "content": " a\n"}, {"whitespace"}),
        ({**SAID, "content": [{"type": "text", "text": "a"}]}, {"content_parts"}),
        ({k: v for k, v in SAID.items() if k != "reasoning_content"}, {"reasoning_dropped"}),
        ({**SAID, "reasoning_content": None, "reasoning": "other"}, {"reasoning_changed"}),
        ({**SAID, "tool_calls": [{**CALL, "id": "mine"}]}, {"ids_renamed"}),
        ({**SAID, "tool_calls": [{**CALL, "index": 0}]}, {"extra_fields"}),
        ({**SAID, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a":1}'}}]}, {"arguments_reformatted"}),
        ({**SAID, "provider_specific_fields": {"x": 1}}, {"extra_fields"}),
        ({**SAID, "refusal": None}, {"empty_fields"}),
        ({**SAID, "content": "a ", "refusal": "no", "reasoning_content": ""}, {"whitespace", "extra_fields", "reasoning_dropped"}),
    ],
)
def test_each_difference_has_a_name(sent: JSON, needed: set[str]):
    assert message_key(SAID) == message_key(sent)
    assert leniencies(SAID, sent) == needed


@given(MESSAGE, MESSAGE)
def test_what_the_canonical_matcher_takes_for_the_same_is_never_called_other(one: JSON, other: JSON):
    if message_key(one) == message_key(other):
        assert "other" not in leniencies(one, other)


def test_a_leniency_is_counted_when_a_request_first_contains_the_turn_and_not_again(session: Session):
    play(session, ask(user("a")), "x")
    stripped = [user("a"), assistant(" x "), user("b")]
    play(session, ask(*stripped), "y")
    begin(session, ask(*stripped, assistant("y"), user("c")))
    assert metadata(session)["leniencies"] == {"whitespace": 1}


def test_a_clients_exact_words_need_no_leniency(session: Session):
    history = [user("a")]
    for i in range(5):
        play(session, ask(*history), f"r{i}")
        history += [assistant(f"r{i}"), user(f"u{i}")]
    assert metadata(session)["leniencies"] == {}
