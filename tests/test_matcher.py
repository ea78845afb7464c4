"""Matchers that can be chosen, and digests that are worked out once."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ask, assistant, make_session, play, user
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest, ConfigError, MatcherFailed
from rollout_ft.session import matcher
from rollout_ft.session.canonical import message_key, running_digests
from rollout_ft.session.matcher import Seen, load
from rollout_ft.session.session import Begin
from rollout_ft.types import JSON

TEXT = st.sampled_from(["a", "b", "a ", ""])
CONTENT = TEXT | TEXT.map(lambda t: [{"type": "text", "text": t}]) | st.none()
ARGUMENTS = st.sampled_from(["{}", "", '{"a": 1}', '{"a":1}', "not json"]) | st.sampled_from([{"a": True}, {"a": 1}, {"a": 1.0}])
CALL = st.builds(lambda i, a: {"id": i, "type": "function", "function": {"name": "f", "arguments": a}}, st.sampled_from("xy"), ARGUMENTS)
MESSAGE = st.one_of(
    st.builds(lambda c: {"role": "user", "content": c}, CONTENT),
    st.builds(lambda c, calls: {"role": "assistant", "content": c, "tool_calls": calls}, CONTENT, st.lists(CALL, max_size=2)),
    st.builds(lambda c, i: {"role": "tool", "content": c, "tool_call_id": i}, CONTENT, st.sampled_from("xyz")),
)
CONVERSATIONS = st.lists(st.tuples(st.sampled_from([b"", b"tools"]), st.lists(MESSAGE, max_size=6)), max_size=8)


@given(CONVERSATIONS)
def test_digests_that_are_kept_are_those_that_are_worked_out(requests: list[tuple[bytes, list[JSON]]]):
    seen = Seen(message_key)
    for tools, messages in requests:
        assert seen.digests(tools, messages) == running_digests(tools, messages)


def test_only_new_messages_are_hashed():
    hashed: list[JSON] = []

    def key(message: JSON, where: str) -> bytes:
        hashed.append(message)
        return message_key(message, where)

    seen = Seen(key)
    history = [user(f"{i}") for i in range(50)]
    seen.digests(b"", history)
    hashed.clear()
    seen.digests(b"", [dict(m) for m in history] + [user("new")])
    assert hashed == [user("new")]


def test_true_is_not_taken_for_the_1_that_was_there_before():
    def called(value: Any) -> list[JSON]:
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": value}}}]}]

    seen = Seen(message_key)
    assert seen.digests(b"", called(1)) == running_digests(b"", called(1))
    assert seen.digests(b"", called(True)) == running_digests(b"", called(True)) != running_digests(b"", called(1))


def test_a_message_that_is_none_is_named_and_forgets_nothing():
    seen = Seen(message_key)
    seen.digests(b"", [user("a"), user("b")])
    with pytest.raises(BadRequest, match=r"messages\[1\]"):
        seen.digests(b"", [user("a"), {"role": "nobody"}, user("c")])
    assert seen.digests(b"", [user("a"), user("b")]) == running_digests(b"", [user("a"), user("b")])


def test_messages_that_are_seen_again_are_kept_once():
    seen = Seen(message_key)
    first = [user("a")]
    seen.digests(b"", first)
    seen.digests(b"", [user("a"), user("b")])
    assert seen._messages[0] is first[0]


REPLY: JSON = {
    "role": "assistant",
    "content": "a",
    "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    "other",
    [{**REPLY, "content": "a "}, {**REPLY, "reasoning_content": "hm"}, {**REPLY, "tool_calls": [{**REPLY["tool_calls"][0], "id": "y"}]}],
)
def test_strict_takes_what_a_client_sends_back_as_it_stands(other: JSON):
    strict = load("strict")
    assert strict(REPLY, "") != strict(other, "")
    assert message_key(REPLY) == message_key(other)


def test_strict_still_takes_none_empty_and_missing_for_the_same():
    strict = load("strict")
    assert strict({"role": "assistant", "content": None}, "") == strict({"role": "assistant", "content": "", "tool_calls": []}, "")
    assert strict({**REPLY, "refusal": None}, "") == strict(REPLY, "")


# Functions of one's own, as `session.matcher: test_matcher:NAME`.


def first_word(message: JSON) -> bytes:
    return f"{message['role']} {(message['content'] or ' ').split(' ')[0]}".encode()


def raises(message: JSON) -> bytes:
    raise KeyError("mine")


def no_bytes(message: JSON) -> Any:
    return True


async def asynchronous(message: JSON) -> bytes:
    return b""


class Hidden:
    async def __call__(self, message: JSON) -> bytes:
        return b""


hidden = Hidden()


def test_a_function_of_ones_own_decides_what_is_the_same():
    session = make_session(SessionConfig(matcher="test_matcher:first_word"))
    node = play(session, ask(user("a long way"), digests=session.digests(b"", [user("a long way")])), "x y")
    again = [user("a short way"), assistant("x z"), user("b")]
    decision = session.decide(ask(*again, digests=session.digests(b"", again)))
    assert isinstance(decision, Begin)
    assert decision.flight.parent is node
    assert session.leniencies == {"other": 2}


@pytest.mark.parametrize(
    ("name", "why"), [("raises", "KeyError: 'mine'"), ("no_bytes", "bool, not bytes"), ("hidden", "coroutine, not bytes")]
)
def test_a_matcher_that_fails_is_named_with_the_reason(name: str, why: str):
    session = make_session(SessionConfig(matcher=f"test_matcher:{name}"))
    with pytest.raises(MatcherFailed, match=f"session.matcher test_matcher:{name} .*{why}"):
        session.digests(b"", [user("a")])


@pytest.mark.parametrize("name", ["", "lenient", "test_matcher:nothing", "nowhere:f", "test_matcher:REPLY", "test_matcher:asynchronous"])
def test_a_matcher_that_cannot_be_one_is_refused_at_start(name: str):
    with pytest.raises(ConfigError, match=r"session\.matcher"):
        load(name)


def test_what_is_no_message_is_refused_whatever_the_matcher():
    for name in ("canonical", "strict", "test_matcher:first_word"):
        with pytest.raises(BadRequest, match="content"):
            matcher.load(name)({"role": "user", "content": 3}, "message")
