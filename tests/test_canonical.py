"""When two messages are the same message."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.errors import BadRequest
from rollout_ft.session.canonical import message_key, running_digests


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}],
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "user", "content": "a"}, {"content": "a", "role": "user"}),
        ({"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}),
        ({"role": "assistant", "content": None}, {"role": "assistant"}),
        ({"role": "assistant", "content": "a "}, {"role": "assistant", "content": "a"}),
        ({"role": "assistant", "content": "a", "reasoning_content": "hm"}, {"role": "assistant", "content": "a"}),
        ({"role": "assistant", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "a"}),
        (call('{"a": 1, "b": 2}'), call('{"b":2,"a":1}')),
        (call(""), call("{}")),
        (call(None), call("{}")),
        (call("{}"), call("{}", id="another")),
        (call("not json"), call(" not json ")),
        (call("  "), call("{}")),
        (call({"a": 1}), call('{"a": 1}')),
        (call('{"a": 1.0, "b": [2e3]}'), call('{"a": 1, "b": [2000.0]}')),
        (call('{"a": "\\u00e9"}'), call('{"a": "é"}')),
        (call("{}"), call("{}", index=0, provider_specific_fields=None)),
        ({"role": "assistant", "content": "a", "provider_specific_fields": {"x": 1}}, {"role": "assistant", "content": "a"}),
        ({"role": "assistant", "content": "a", "reasoning": "hm"}, {"role": "assistant", "content": "a", "reasoning_content": "other"}),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": "ab"}),
    ],
)
def test_differences_that_clients_make_are_no_differences(one: dict[str, Any], other: dict[str, Any]):
    assert message_key(one) == message_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a "}),
        ({"role": "user", "content": "a"}, {"role": "system", "content": "a"}),
        (call('{"a": 1}'), call('{"a": 2}')),
        (call('{"a": 1}'), call('{"a": true}')),
        (call('{"a": 1.5}'), call('{"a": 1}')),
        (call('{"a": "1.0"}'), call('{"a": "1"}')),
        (call('{"a": [1, 2]}'), call('{"a": [2, 1]}')),
        ({"role": "user", "content": "a", "name": "b"}, {"role": "user", "content": "a"}),
        ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}),
    ],
)
def test_what_a_model_would_see_is_a_difference(one: dict[str, Any], other: dict[str, Any]):
    assert message_key(one) != message_key(other)


@pytest.mark.parametrize("content", [3, {"a": 1}, [{"type": "image_url"}], ["a"], [None]])
def test_what_cannot_be_rendered_is_named(content: Any):
    with pytest.raises(BadRequest, match="content"):
        message_key({"role": "user", "content": content})


def test_reasoning_is_an_assistants_alone():
    with pytest.raises(BadRequest, match="reasoning"):
        message_key({"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]})


def results(*ids: str, called: tuple[str, ...] = ("a", "b")) -> bytes:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in called]
    said = [{"role": "tool", "tool_call_id": i, "content": "done"} for i in ids]
    return running_digests(b"", [{"role": "assistant", "content": None, "tool_calls": calls}, *said])[-1]


def test_ids_of_calls_may_be_renamed_or_left_out():
    assert results("a", "b") == results("x", "y", called=("x", "y")) == results("", "")


def test_a_result_of_another_call_is_another_result():
    assert results("a", "b") != results("b", "a")
    assert results("b", "a") == results("y", "x", called=("x", "y"))


@given(st.lists(st.builds(lambda r, t: {"role": r, "content": t}, st.sampled_from(["user", "assistant"]), st.text()), min_size=1))
def test_a_prefix_of_a_conversation_has_a_prefix_of_its_digests(messages: list[dict[str, Any]]):
    whole = running_digests(b"", messages)
    assert all(running_digests(b"", messages[:n]) == whole[: n + 1] for n in range(len(messages)))


@given(st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text()))
def test_the_formatting_of_arguments_is_no_difference(arguments: dict[str, Any]):
    spaced = orjson.dumps(arguments, option=orjson.OPT_INDENT_2).decode()
    assert message_key(call(spaced)) == message_key(call(orjson.dumps(arguments).decode()))


@pytest.mark.parametrize("calls", [5, [{"function": {"name": "f"}}], {"a": 1}])
def test_tool_calls_of_anybody_but_an_assistant_are_refused_by_name(calls: object):
    with pytest.raises(BadRequest, match="tool_calls, which only an assistant has"):
        message_key({"role": "user", "content": "a", "tool_calls": calls})
