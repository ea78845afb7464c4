"""Anything that can be sent, against the parser, the matcher and the session's decisions.

A body is a valid one of which parts were replaced by anything: nearly right finds more than noise.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import orjson
import pytest
from conftest import ask, assistant, make_session, play, user
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.body import load_json
from rollout_ft.gateway.dialects import COUNT, DIALECTS, Asked, Dialect, Evidence, Rules
from rollout_ft.session.canonical import message_key, running_digests
from rollout_ft.session.session import Attach, Begin, Replay, Session
from rollout_ft.testing.plain import VOCAB_SIZE

many = settings(max_examples=150, deadline=None)
RULES = Rules("t1~1", max_messages=50, max_output_tokens=64, vocab_size=VOCAB_SIZE)

WORDS = ["", "\0", "\u2028", "<|im_end|>", "{}", '{"a":1}', "text", "user"]
NAMES = ["type", "text", "role", "function"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(WORDS)
NUMBER = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}
OPENAI: list[dict[str, Any]] = [
    {"role": "system", "content": "s"}, user("a"), {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "r"},
    {**assistant("b"), "reasoning_content": "t"}, user("c"),
]  # fmt: skip
CHAT_BODY: dict[str, Any] = {
    "model": "m", "messages": OPENAI, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "temperature": 0.5,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}],
    "tool_choice": "auto", "max_tokens": 5, "stop": ["x"], "seed": 3, "n": 1, "response_format": {"type": "text"},
}  # fmt: skip
BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
]  # fmt: skip
MESSAGES_BODY: dict[str, Any] = {
    "model": "m", "max_tokens": 5, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [user("a"), {"role": "assistant", "content": BLOCKS}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}], "is_error": False}]}],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
    "stop_sequences": ["x"], "thinking": {"type": "disabled"}, "top_k": 3, "stream": False,
}  # fmt: skip
GENERATE_BODY: dict[str, Any] = {
    "input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 3, "stop": "x", "temperature": 1.0}, "return_logprob": True, "rid": "r",
}  # fmt: skip
BODIES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "chat": (DIALECTS["chat"], CHAT_BODY), "messages": (DIALECTS["messages"], MESSAGES_BODY),
    "count": (COUNT, MESSAGES_BODY), "generate": (DIALECTS["generate"], GENERATE_BODY),
}  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in inside for place in places(child, (*at, key)))]


@st.composite
def nearly(draw: st.DrawFn, body: Any) -> Any:
    """A valid value in which up to three parts are something else, gone, doubled, or have something more."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from([p for p in places(body) if p] or [(None,)]))
        if last is None:
            return draw(VALUE)
        parent = body
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "drop", "double", "add"])):
            case "replace":
                parent[last] = draw(VALUE)
            case "drop":
                del parent[last]
            case "double" if isinstance(parent, list):
                parent.insert(last, copy.deepcopy(parent[last]))
            case _ if isinstance(parent, dict):
                parent[draw(TEXT)] = draw(VALUE)
            case _:
                parent.append(draw(VALUE))
    return body


def parsed(dialect: Dialect, body: bytes) -> Asked | None:
    """What was understood; None when it was refused, which must be a 4xx that says why."""
    try:
        return dialect.parse(body, Evidence("r1"), RULES)
    except BadRequest as e:
        assert 400 <= e.status < 500
        assert str(e)
        orjson.dumps([e.message, e.code, e.param])  # it can be told
        dialect.error(str(e), e.code, e.status, e.param)
        return None


def state(session: Session) -> bytes:
    """Everything that a request could change."""
    parts = [session.evidence, sorted(session.tree.nodes), sorted(session.flights), session.counts, session.leniencies]
    return pickle.dumps([*parts, session.known, session._order])


@pytest.mark.parametrize("name", BODIES)
def test_a_body_of_any_kind_is_a_turn_or_a_4xx_and_a_refusal_changes_nothing(name: str):
    dialect, valid = BODIES[name]
    assert parsed(dialect, orjson.dumps(valid)) is not None

    @many
    @given(nearly(valid))
    def check(body: Any):
        session = make_session()
        play(session, ask(user("a")), "b")
        asked = parsed(dialect, orjson.dumps(body))
        if asked is None:
            return
        before = state(session)
        try:
            decision = session.decide(asked.turn)
        except BadRequest as e:
            assert 400 <= e.status < 500
            assert state(session) == before
        else:
            assert isinstance(decision, Begin | Attach | Replay)

    check()


@many
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_bytes_of_any_kind_are_an_object_or_a_400(body: bytes):
    for data in (body, b'{"messages":' + body + b"}"):
        try:
            assert isinstance(load_json(data), dict)
        except BadRequest as e:
            assert e.status == 400


KEYS = st.text(st.sampled_from('ab":\\ \n\t{}[],'), max_size=4)
SPACE = st.sampled_from(["", "", "", " ", "\n", "\t \r\n"])


@st.composite
def written(draw: st.DrawFn, depth: int = 2) -> tuple[str, bool]:
    """An object as text, and whether a key stands in one of its objects twice."""
    twice, seen, parts = False, set[str](), list[str]()
    for _ in range(draw(st.integers(0, 4))):
        key = draw(KEYS)
        twice |= key in seen
        seen.add(key)
        if depth and draw(st.booleans()):
            value, inner = draw(written(depth - 1))
            twice |= inner
        else:
            value = orjson.dumps(draw(KEYS)).decode()
        quoted = orjson.dumps(key).decode()
        if draw(st.booleans()) and key.startswith("a"):
            quoted = '"\\u0061' + quoted[2:]
        parts.append(f"{quoted}{draw(SPACE)}:{draw(SPACE)}{value}")
    return "{" + ",".join(parts) + "}", twice


@settings(max_examples=400, deadline=None)
@given(written())
def test_a_key_that_stands_twice_is_always_found_and_no_other_object_is_refused(given_: tuple[str, bool]):
    text, twice = given_
    try:
        value = load_json(text.encode())
    except BadRequest as e:
        assert (e.code, twice) == ("duplicate_key", True)
    else:
        assert not twice
        assert value == orjson.loads(text)


@pytest.mark.parametrize("depth", [1, 2, 7, 8, 9, 100, 1000])
def test_what_nests_deeper_than_allowed_is_refused_and_nothing_else(depth: int):
    for opened, closed in (('{"a":', "}"), ("[", "]")):
        body = ('{"a":' + opened * (depth - 1) + "1" + closed * (depth - 1) + "}").encode()
        if depth <= 8:
            assert load_json(body, 8)
        else:
            with pytest.raises(BadRequest, match="max_json_depth"):
                load_json(body, 8)


# The matcher.


def key_of(message: Any) -> bytes | None:
    """The canonical form of a message; None when it is none, which must be a 4xx."""
    try:
        return message_key(message)
    except BadRequest as e:
        assert e.status == 400
        return None


ANY_MESSAGE = st.sampled_from(OPENAI).flatmap(nearly).filter(lambda m: isinstance(m, dict))


@many
@given(ANY_MESSAGE)
def test_the_matcher_knows_every_message_or_refuses_it_and_says_the_same_after_a_journey(message: Any):
    key = key_of(message)
    assert key == key_of(orjson.loads(orjson.dumps(message, option=orjson.OPT_SORT_KEYS)))


@many
@given(ANY_MESSAGE, ANY_MESSAGE, ANY_MESSAGE)
def test_to_be_the_same_message_is_an_equivalence(a: Any, b: Any, c: Any):
    keys = [key_of(m) for m in (a, b, c)]
    assume(None not in keys)
    assert keys[0] == key_of(copy.deepcopy(a))
    if keys[0] == keys[1] and keys[1] == keys[2]:
        assert keys[0] == keys[2]


@many
@given(st.lists(ANY_MESSAGE, max_size=5), st.data())
def test_a_prefix_of_a_conversation_has_a_prefix_of_its_digests(messages: list[Any], data: st.DataObject):
    try:
        digests = running_digests(b"", messages)
    except BadRequest:
        return
    assert len(digests) == len(messages) + 1
    cut = data.draw(st.integers(0, len(messages)))
    assert running_digests(b"", messages[:cut]) == digests[: cut + 1]
    assert running_digests(b"tools", messages)[cut] != digests[cut]
