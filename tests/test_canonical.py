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
        ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}),
    ],
)
def test_what_a_model_would_see_is_a_difference(one: dict[str, Any], other: dict[str, Any]):
    assert message_key(one) != message_key(other)


@pytest.mark.parametrize("content", [3, {"a": 1}, [{"type": "image_url"}], ["a"], [None]])
def test_what_cannot_be_rendered_is_named(content: Any):
    with pytest.raises(BadRequest, match="content"):
        message_key({"role": "user", "content": content})


@given(st.lists(st.builds(lambda r, t: {"role": r, "content": t}, st.sampled_from(["user", "assistant"]), st.text()), min_size=1))
def test_a_prefix_of_a_conversation_has_a_prefix_of_its_digests(messages: list[dict[str, Any]]):
    whole = running_digests(b"", messages)
    assert all(running_digests(b"", messages[:n]) == whole[: n + 1] for n in range(len(messages)))


@given(st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text()))
def test_the_formatting_of_arguments_is_no_difference(arguments: dict[str, Any]):
    spaced = orjson.dumps(arguments, option=orjson.OPT_INDENT_2).decode()
    assert message_key(call(spaced)) == message_key(call(orjson.dumps(arguments).decode()))
