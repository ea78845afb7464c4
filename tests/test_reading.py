"""A session's bodies, read where they are new, against reading each of them whole."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.errors import BadRequest
from rollout_ft.gateway import reading
from rollout_ft.gateway.bodies import Bodies
from rollout_ft.gateway.body import load_json
from rollout_ft.gateway.reading import NotRead, Reading

Message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=6)}) | st.recursive(
    st.none() | st.integers(0, 9) | st.sampled_from(['"messages":[', "]}", '"', "\\"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["messages", "a"]), inner, max_size=2),
    max_leaves=4,
)
Field = st.sampled_from(["model", "metadata", "messages", "x"])
Body = st.tuples(
    st.integers(0, 3),
    st.lists(Message, max_size=3),
    st.lists(st.tuples(Field, Message), max_size=2),
    st.lists(st.tuples(Field, Message), max_size=2),
    st.booleans(),
)
"""Messages kept of the body before, new ones, fields in front of the messages, fields behind them, with spaces."""


def written(messages: list[Any], before: list[tuple[str, Any]], after: list[tuple[str, Any]], spaced: bool) -> bytes:
    pairs = [*before, ("messages", messages), *after]
    comma, colon = (" , ", " : ") if spaced else (",", ":")
    each = (f"{json.dumps(k)}{colon}{json.dumps(v, separators=(comma, colon), ensure_ascii=spaced)}" for k, v in pairs)
    return ("{" + comma.join(each) + "}").encode()


def outcome(load: Any, body: bytes) -> Any:
    try:
        return load(body)
    except BadRequest as e:
        return e.code, str(e)


@given(bodies=st.lists(Body, min_size=2, max_size=8))
def test_every_body_says_what_it_says_when_it_is_read_alone(bodies: list[Any]):
    session, messages = Reading(), []
    for back, new, before, after, spaced in bodies:
        messages = [*messages[: len(messages) - back], *new]
        body = written(messages, before, after, spaced)
        assert outcome(session.load, bytearray(body)) == outcome(load_json, body)


@given(bodies=st.lists(st.tuples(Body, st.integers(0, 1)), min_size=2, max_size=8))
def test_a_body_of_which_only_the_rest_is_sent_says_what_the_whole_says(bodies: list[Any]):
    """Through either of two gateways, of which each knows only what it sent itself."""
    session, gateways, messages = Reading(), (Bodies(2**20), Bodies(2**20)), []
    for (back, new, before, after, spaced), through in bodies:
        messages = [*messages[: len(messages) - back], *new]
        body = written(messages, before, after, spaced)
        name, known = gateways[through].known("s", body)
        try:
            said = session.load_rest(name.decode(), body[known:])
        except NotRead:
            said = outcome(session.load, bytearray(body))
        assert said == outcome(load_json, body)
        if isinstance(said, dict) and session.name:
            gateways[through].keep("s", session.name, body)


def test_the_rest_is_enough_for_whoever_read_the_body_before_and_for_nobody_else():
    session, gateway = Reading(), Bodies(2**20)
    first, second = b'{"messages":[{"a":1}],"model":"m"}', b'{"messages":[{"a":1},{"b":2}],"model":"m"}'
    session.load(first)
    gateway.keep("s", session.name, first)
    name, known = gateway.known("s", second)
    assert second[known:] == b',{"b":2}],"model":"m"}'
    with pytest.raises(NotRead):
        Reading().load_rest(name.decode(), second[known:])
    with pytest.raises(NotRead):
        session.load_rest("", second[known:])
    assert session.load_rest(name.decode(), second[known:]) == load_json(second)
    with pytest.raises(NotRead):
        session.load_rest(name.decode(), second[known:])  # it has gone on since
    assert session.load(second.replace(b"]", b',{"c":3}]'))["messages"] == [{"a": 1}, {"b": 2}, {"c": 3}]


@pytest.mark.parametrize("rest", [b"", b"]", b",]}", b',{"b":2}', b'],"a":1,"a":2}', b"x"])
def test_a_rest_that_cannot_be_read_changes_nothing(rest: bytes):
    session = Reading()
    session.load(b'{"messages":[{"a":1}]}')
    name = session.name
    with pytest.raises(NotRead):
        session.load_rest(name, rest)
    assert session.load_rest(name, b',{"b":2}]}') == {"messages": [{"a": 1}, {"b": 2}]}


def test_the_longest_unused_bodies_give_way_to_new_ones():
    bodies = Bodies(25)
    for sid in ("a", "b", "a", "c"):
        bodies.keep(sid, "x.1:5", b"0123456789")
    assert [bodies.known(sid, b"01234...")[1] for sid in ("a", "b", "c")] == [5, 0, 5]
    assert bodies.bytes == 20
    assert bodies.known("a", b"01235") == (b"", 0)
    bodies.keep("a", "x.2:30", b"0" * 30)
    assert bodies.bytes == 0


ENDS = [",]}", "]}", ',{}],"messages":[]}', ' ,{"a":1}]}', ',{"a":1,"a":2}]}']


@given(kept=st.integers(0, 60), tail=st.text(alphabet='{}[],:" \nabmesg0', max_size=24) | st.sampled_from(ENDS))
def test_whatever_follows_what_was_read_is_refused_or_read_as_it_is_alone(kept: int, tail: str):
    first = b'{"messages":[{"role":"user","content":"a"},{"role":"b"}],"model":"m"}'
    for begun in (first, first.replace(b",", b" , ")):
        session = Reading()
        session.load(begun)
        for body in (begun[:kept] + tail.encode(), begun[: begun.rindex(b"}]") + 1] + tail.encode()):
            assert outcome(session.load, body) == outcome(load_json, body)


@pytest.mark.parametrize("body", [{"messages": [], "model": "m"}, {"max_tokens": 5, "messages": []}])
@pytest.mark.parametrize("spaced", [False, True])
def test_what_was_sent_before_is_not_read_again(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], spaced: bool):
    session, read = Reading(), []
    monkeypatch.setattr(reading, "load_json", lambda text, depth: read.append(len(text)) or load_json(text, depth))
    messages = [{"role": "user", "content": "x" * 1000}]
    dump = json.dumps if spaced else orjson.dumps
    for _ in range(4):
        text = dump({**body, "messages": messages})
        said = session.load(text.encode() if isinstance(text, str) else text)
        assert said["messages"] == messages
        messages = [*messages, {"role": "assistant", "content": "y" * 10}]
    assert max(read[1:]) < 200 < min(read[:1])


def test_messages_that_were_there_before_are_the_same_objects():
    session = Reading()
    first = session.load(b'{"messages":[{"role":"user","content":"a"}]}')
    again = session.load(b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}')
    assert again["messages"][0] is first["messages"][0]


@pytest.mark.parametrize("body", [b'{"messages":[{"a":1}', b'{"messages":[{"a":1},]}', b'{"messages":[{"a":1},{"a":1,"a":2}]}', b"[]"])
def test_a_body_that_is_refused_changes_nothing(body: bytes):
    session = Reading()
    session.load(b'{"messages":[{"a":1}]}')
    with pytest.raises(BadRequest):
        session.load(body)
    assert session.load(b'{"messages":[{"a":1},{"b":2}]}') == {"messages": [{"a": 1}, {"b": 2}]}
