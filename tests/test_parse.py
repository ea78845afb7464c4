"""Sampled ids to the assistant's message."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from conftest import ask, begin, make_session, turn_of, user
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.session.canonical import message_key
from rollout_ft.session.parse import assistant_message
from rollout_ft.testing.plain import START, STOP, PlainTemplate

RENDERER = PlainTemplate()


def said(text: str | bytes, *, stop: tuple[str, ...] = (), tools: bool = True, key: str = "k" * 32, end: bool = True) -> dict[str, Any]:
    ids = [*(text.encode() if isinstance(text, str) else text), *([STOP] if end else [])]
    return assistant_message(ids, RENDERER, stop=list(stop), turn_key=key, tools=tools)[0]


def call(source: str) -> str:
    return f"<tool_call>\n{source}\n</tool_call>"


GOOD = call('{"name": "f", "arguments": {"a": 1}}')


def test_plain_text_is_the_content():
    assert said("hello \N{EURO SIGN}") == {"role": "assistant", "content": "hello \N{EURO SIGN}"}


def test_the_stop_token_is_cut_only_at_the_end():
    message, _ = assistant_message([97, STOP, 98], RENDERER, stop=[], turn_key="k", tools=False)
    assert message["content"] == "ab"


def test_nothing_said_is_empty_content():
    assert said("") == {"role": "assistant", "content": ""}
    assert said("", end=False) == {"role": "assistant", "content": ""}


def test_a_tool_call_is_parsed():
    message, finish = assistant_message([*GOOD.encode(), STOP], RENDERER, stop=[], turn_key="k" * 32, tools=True)
    assert finish == "tool_calls"
    assert message["content"] is None
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "f", "arguments": '{"a":1}'}]
    assert message["tool_calls"][0]["type"] == "function"


def test_text_around_tool_calls_stays_content():
    message = said(f"before {GOOD} between {GOOD} after")
    assert message["content"] == "before  between  after"
    assert len(message["tool_calls"]) == 2


def test_the_calls_of_one_turn_have_ids_of_their_own_and_the_same_ones_each_time():
    ids = [c["id"] for c in said(GOOD + GOOD)["tool_calls"]]
    assert len(set(ids)) == 2
    assert ids == [c["id"] for c in said(GOOD + GOOD)["tool_calls"]]


def test_the_calls_of_different_turns_have_different_ids():
    assert said(GOOD, key="a" * 32)["tool_calls"][0]["id"] != said(GOOD, key="b" * 32)["tool_calls"][0]["id"]


def test_without_tools_a_call_is_text():
    assert said(GOOD, tools=False) == {"role": "assistant", "content": GOOD}


@pytest.mark.parametrize(
    "text",
    [
        call("not json"), call("{'name': 'f'}"), call('{"name": "f"'), call("[]"), call('{"arguments": {}}'), call('{"name": 3}'),
        '<tool_call>{"name": "f"}', '{"name": "f", "arguments": {}}', "<tool_call></tool_call>", call('{"name": NaN}'),
        call('{"name": "\\ud800"}'), call("{" * 2000),
    ],
)  # fmt: skip
def test_a_call_that_does_not_parse_stays_text(text: str):
    assert said(text) == {"role": "assistant", "content": text}


def test_a_broken_call_does_not_take_a_good_one_along():
    message = said(call("{broken}") + GOOD)
    assert message["content"] == call("{broken}")
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["f"]


@pytest.mark.parametrize("arguments", ["{}", '{"a":{"b":[1,2]}}', '{"a":"}</tool"}'])
def test_arguments_of_any_shape_are_passed_on_as_json(arguments: str):
    made = said(call(f'{{"name": "f", "arguments": {arguments}}}'))["tool_calls"][0]["function"]["arguments"]
    assert orjson.loads(made) == orjson.loads(arguments)


def test_arguments_that_are_text_already_are_passed_on_as_they_are():
    assert said(call('{"name": "f", "arguments": "{\\"a\\": 1}"}'))["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_a_call_without_arguments_has_none():
    assert said(call('{"name": "f"}'))["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("text", [False, True], ids=["object", "text"])
def test_arguments_nested_deep_break_neither_the_parser_nor_the_tree(text: bool):
    deep = '{"a":' * 300 + "1" + "}" * 300
    source = orjson.dumps({"name": "f", "arguments": deep}).decode() if text else f'{{"name": "f", "arguments": {deep}}}'
    message = said(call(source))
    assert message["role"] == "assistant"
    message_key(message)


@pytest.mark.parametrize(
    ("text", "stop", "content"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("four",), "one two three"),
        ("one two two", ("two",), "one "),
        ("two", ("two",), ""),
        ("a\N{EURO SIGN}b", ("\N{EURO SIGN}",), "a"),
    ],
)
def test_the_text_is_cut_at_the_first_stop_string(text: str, stop: tuple[str, ...], content: str):
    assert said(text, stop=stop) == {"role": "assistant", "content": content}


def test_a_call_behind_a_stop_string_was_never_made():
    assert said("STOP" + GOOD, stop=("STOP",)) == {"role": "assistant", "content": ""}


def test_bytes_are_decoded_over_all_ids_at_once():
    assert said(b"\xe2\x82\xac") == {"role": "assistant", "content": "\N{EURO SIGN}"}


PIECES = st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", '"name"', ":", '"f"', "\n", '"arguments"', ",", "null", "\xe9"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, START), max_size=30) | st.lists(PIECES, max_size=20).map(lambda p: list("".join(p).encode())), st.booleans())
def test_whatever_a_model_writes_becomes_a_message_that_clients_and_the_tree_can_hold(ids: list[int], tools: bool):
    made = assistant_message(ids, RENDERER, stop=[], turn_key="k", tools=tools)
    assert made == assistant_message(ids, RENDERER, stop=[], turn_key="k", tools=tools)
    assert message_key(orjson.loads(orjson.dumps(made[0])))


def test_a_turn_with_any_reply_enters_the_tree():
    session = make_session()
    node = session.committed(turn_of(begin(session, ask(user("a"))), GOOD, session))
    assert node.tokens > len(GOOD)
