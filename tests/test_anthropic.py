"""Anthropic's dialect: its blocks are the same conversation as OpenAI's messages, and its streams keep their order."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import Any

import orjson
import pytest
from conftest import ask, assistant, begin, commit, make_session, turn_of, user
from door import door
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway import KEYS, SID

from rollout_ft.errors import BadRequest, EngineRefused
from rollout_ft.gateway.dialects import Evidence, Rules
from rollout_ft.gateway.dialects.anthropic_reply import MessagesRequest, error_body, reply_body, reply_events
from rollout_ft.gateway.dialects.anthropic_request import parse_messages
from rollout_ft.gateway.dialects.openai_request import parse_chat
from rollout_ft.session.canonical import running_digests
from rollout_ft.session.tree import Node
from rollout_ft.testing.plain import PlainTemplate

RENDERER = PlainTemplate()
RULES = Rules("t1~1", max_messages=8, max_output_tokens=100)
BASH = {"name": "bash", "description": "runs", "input_schema": {"type": "object", "properties": {"cmd": {"type": "string"}}}}
OPENAI_BASH = {"type": "function", "function": {"name": "bash", "description": "runs", "parameters": BASH["input_schema"]}}


def parse(body: Any, rules: Rules = RULES) -> MessagesRequest:
    return parse_messages(body if isinstance(body, bytes) else orjson.dumps(body), Evidence("r1"), rules)


def said(**fields: Any) -> MessagesRequest:
    return parse({"max_tokens": 10, "messages": [user("a")], **fields})


def messages_of(*messages: Any, **fields: Any) -> list[Any]:
    return said(messages=list(messages), **fields).turn.messages


def refused(**fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as e:
        said(**fields)
    assert e.value.status == 400
    assert len(str(e.value).splitlines()) == 1
    return e.value


# What becomes of a body.


@pytest.mark.parametrize("system", ["be brief", [{"type": "text", "text": "be "}, {"type": "text", "text": "brief", "cache_control": {}}]])
def test_the_system_prompt_is_the_first_message(system: Any):
    assert messages_of(user("a"), system=system) == [{"role": "system", "content": "be brief"}, user("a")]


@pytest.mark.parametrize("system", [None, "", []])
def test_no_system_prompt_is_no_message(system: Any):
    assert messages_of(user("a"), system=system) == [user("a")]


def test_blocks_of_text_are_one_message():
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert messages_of({"role": "user", "content": blocks}) == [user("ab")]


@pytest.mark.parametrize(
    ("block", "content"),
    [
        ({"content": "out"}, "out"),
        ({"content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ut"}]}, "out"),
        ({}, ""),
        ({"content": "no such file", "is_error": True}, "Error: no such file"),
        ({"content": "out", "is_error": False, "cache_control": {}}, "out"),
    ],
)
def test_a_tools_result_is_a_message_of_the_tool(block: dict[str, Any], content: str):
    made = messages_of({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", **block}]})
    assert made == [{"role": "tool", "tool_call_id": "c1", "content": content}]


def test_results_and_text_of_one_message_keep_their_order():
    results = [{"type": "tool_result", "tool_use_id": f"c{i}", "content": str(i)} for i in range(2)]
    made = messages_of({"role": "user", "content": [*results, {"type": "text", "text": "go on"}]})
    assert [(m["role"], m["content"]) for m in made] == [("tool", "0"), ("tool", "1"), ("user", "go on")]


def test_an_assistants_blocks_are_one_message_with_reasoning_and_calls():
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "I look"},
        {"type": "tool_use", "id": "c1", "name": "bash", "input": {"cmd": "ls"}},
    ]
    (_, made, _) = messages_of(user("a"), {"role": "assistant", "content": blocks}, user("b"))
    function = {"name": "bash", "arguments": '{"cmd":"ls"}'}
    calls = [{"id": "c1", "type": "function", "function": function}]
    assert made == {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": calls}


def test_sampling_is_passed_on_under_the_engines_names():
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_tokens": 7, "stop_sequences": ["x"]}
    assert said(**fields).turn.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_new_tokens": 7, "stop": ["x"]}


@pytest.mark.parametrize(
    ("thinking", "kwargs"),
    [
        (None, {}), ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}), ({"type": "adaptive"}, {}),
        ({"type": "disabled"}, {"enable_thinking": False}),
    ],
)  # fmt: skip
def test_thinking_is_an_argument_of_the_chat_template_and_no_engines_affair(thinking: Any, kwargs: Any):
    turn = said(thinking=thinking).turn
    assert turn.template_kwargs == kwargs
    assert turn.engine_sampling == {"max_new_tokens": 10}


def test_with_other_thinking_it_is_another_turn_of_the_same_conversation():
    one, other = said(thinking={"type": "disabled"}).turn, said(thinking={"type": "enabled", "budget_tokens": 9}).turn
    assert one.digests == other.digests
    session = make_session()
    commit(session, begin(session, one), "x")
    assert begin(session, replace(other, request_id="r2")).number == 0


@pytest.mark.parametrize(("choice", "same"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_the_choice_of_tools_is_openais(choice: str, same: str):
    here = said(tools=[BASH], tool_choice={"type": choice}).turn
    there = parse_chat(
        orjson.dumps({"messages": [user("a")], "max_tokens": 10, "tools": [OPENAI_BASH], "tool_choice": same}), Evidence("r1"), RULES
    )
    assert here == there.turn


def test_one_tool_may_be_demanded_by_its_name():
    turn = said(tools=[BASH, {**BASH, "name": "edit"}], tool_choice={"type": "tool", "name": "edit"}).turn
    assert (turn.forced_call, "edit" in turn.sampling["json_schema"], "bash" in turn.sampling["json_schema"]) == (True, True, False)


def test_marks_for_anthropics_own_service_are_ignored():
    assert said(metadata={"user_id": "u"}, service_tier="auto", model="claude").turn == said().turn


# What is refused.


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [None, 0, -1, "10", True, 1.5]),
        ("messages", [None, [], "a", {}, [3], [user("a")] * 9]),
        ("system", [3, {}, [3], [{"type": "image"}], [{"type": "text"}]]),
        ("stop_sequences", [3, [3], [""]]),
        ("temperature", ["1", -1, True]),
        ("top_k", [0, 1.5, -2]),
        ("stream", ["true", 1]),
        ("thinking", [3, {"type": "much"}, {"type": "enabled", "budget_tokens": 0}, {"budget_tokens": 3}]),
        ("tools", ["f", [3], [{}], [{"name": "f"}], [{**BASH, "input_schema": 3}], [{"type": "bash_20250124", "name": "bash"}]]),
        ("tool_choice", ["auto", {"type": "required"}, {}, {"type": "tool"}, {"type": "any"}, {"type": "tool", "name": "f"}]),
        ("session_id", ["t1~2", 3]),
        ("container", ["c", None]),
        ("input_ids", [[1]]),
        ("lora_path", ["l"]),
    ],
)
def test_a_field_with_a_wrong_value_is_named(field: str, values: list[Any]):
    for value in values:
        assert (refused(**{field: value}).param or "").partition("[")[0].partition(".")[0] == field, value


@pytest.mark.parametrize("kind", ["image", "document", "search_result", "server_tool_use", "redacted_thinking", None, 3])
def test_a_block_that_cannot_be_rendered_is_named_with_its_place(kind: Any):
    block = {"type": kind, "source": {}}
    e = refused(messages=[user("a"), {"role": "user", "content": [{"type": "text", "text": "b"}, block]}])
    assert (e.param, repr(kind) in str(e)) == ("messages[1].content[1]", True)
    inside = {"type": "tool_result", "tool_use_id": "c", "content": [block]}
    assert refused(messages=[{"role": "user", "content": [inside]}]).param == "messages[0].content[0].content[0]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "a"}, {"role": "tool", "content": "a"}, {"content": "a"}, {"role": "user"},
        {"role": "user", "content": 3}, {"role": "user", "content": [3]}, {"role": "user", "content": [{"type": "text", "text": 3}]},
        {"role": "user", "content": [{"type": "tool_result", "content": "a"}]}, {"role": "user", "content": [{"type": "tool_use"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": "{}"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "input": {}}]},
        {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "c"}]},
    ],
    ids=lambda m: orjson.dumps(m).decode()[:60],
)  # fmt: skip
def test_a_message_that_is_none_is_named_with_its_index(message: Any):
    assert (refused(messages=[message, user("b")]).param or "").startswith("messages[0]")


def test_a_reply_cannot_be_begun_for_the_model():
    assert "last message" in str(refused(messages=[user("a"), assistant("I")]))


def test_one_call_at_most_is_refused_unless_a_call_is_demanded():
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert refused(tools=[BASH], tool_choice=choice).param == "parallel_tool_calls"
    said(tools=[BASH], tool_choice={"type": "tool", "name": "bash", "disable_parallel_tool_use": True})
    said(tool_choice=choice)


# Replies.


def replied(message: dict[str, Any], *, finish: str = "stop", sampled: str = "x", stop: list[str] | None = None) -> Node:
    session = make_session()
    request = ask(user("question"), sampling={"max_new_tokens": 8, **({"stop": stop} if stop else {})})
    turn = turn_of(begin(session, request), sampled, session)
    return session.committed(replace(turn, reply=orjson.dumps(message), finish_reason=finish))


def call(arguments: Any, i: int = 0) -> dict[str, Any]:
    return {"id": f"call_{i}", "type": "function", "function": {"name": "bash", "arguments": arguments}}


REPLIES: list[dict[str, Any]] = [
    {"role": "assistant", "content": "hello \N{EURO SIGN}\n"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "so", "reasoning_content": "hm"},
    {"role": "assistant", "content": None, "tool_calls": [call('{"cmd":"ls"}')]},
    {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": [call("{}", 0), call('{"a":[1]}', 1)]},
    {"role": "assistant", "content": None, "tool_calls": [call("")]},
    {"role": "assistant", "content": None, "tool_calls": [call('{"cmd": "ls')]},
    {"role": "assistant", "content": None, "tool_calls": [call("[1, 2]")]},
]


def events(data: bytes) -> list[Any]:
    *sent, nothing = data.split(b"\n\n")
    assert nothing == b""
    found: list[Any] = []
    for event in sent:
        name, line = event.split(b"\n")
        found.append(orjson.loads(line.removeprefix(b"data: ")))
        assert name == b"event: " + found[-1]["type"].encode()
    return found


def rebuilt(data: bytes) -> dict[str, Any]:
    """The message, as Anthropic's clients put it together from its events."""
    message: dict[str, Any] = {}
    for e in events(data):
        match e["type"]:
            case "message_start":
                message = e["message"]
            case "content_block_start":
                assert e["index"] == len(message["content"])
                message["content"].append({**e["content_block"], "json": ""})
            case "content_block_delta":
                block, delta = message["content"][e["index"]], e["delta"]
                key = {"input_json_delta": "json"}.get(delta["type"], delta["type"].removesuffix("_delta"))
                block[key] += delta[{"json": "partial_json"}.get(key, key)]
            case "content_block_stop":
                block = message["content"][e["index"]]
                written = block.pop("json")
                if block["type"] == "tool_use":
                    block["input"] = orjson.loads(written)
            case "message_delta":
                message |= e["delta"]
                message["usage"] |= e["usage"]
            case _:
                pass
    return message


@pytest.mark.parametrize("message", REPLIES)
def test_the_events_of_a_turn_rebuild_its_body(message: dict[str, Any]):
    node = replied(message)
    assert rebuilt(reply_events(node, said(), RENDERER)) == orjson.loads(reply_body(node, said(), RENDERER))


@pytest.mark.parametrize("message", REPLIES)
def test_a_stream_has_its_events_in_order(message: dict[str, Any]):
    found = [e["type"] for e in events(reply_events(replied(message), said(), RENDERER))]
    assert (found[0], found[-2:]) == ("message_start", ["message_delta", "message_stop"])
    inner = [e for e in found[1:-2] if e != "content_block_delta"]
    assert inner == ["content_block_start", "content_block_stop"] * (len(inner) // 2)
    assert len(inner) >= 2


@pytest.mark.parametrize("message", REPLIES)
def test_what_a_client_sends_back_extends_the_turn_it_got(message: dict[str, Any]):
    session = make_session()
    flight = begin(session, said().turn)
    node = session.committed(replace(turn_of(flight, "x", session), reply=orjson.dumps(message)))
    back = {"role": "assistant", "content": orjson.loads(reply_body(node, said(), RENDERER))["content"]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_0", "content": "out"}]}
    request = replace(said(messages=[user("a"), back, result]).turn, request_id="r2")
    assert begin(session, request).parent is node


@pytest.mark.parametrize(
    ("node", "reason", "sequence"),
    [
        (replied(REPLIES[0]), "end_turn", None),
        (replied(REPLIES[3]), "tool_use", None),
        (replied(REPLIES[0], finish="length"), "max_tokens", None),
        (replied(REPLIES[3], finish="length"), "max_tokens", None),
        (replied(REPLIES[0], sampled="one END two", stop=["two", "END"]), "stop_sequence", "END"),
        (replied(REPLIES[0], sampled="one", stop=["END"]), "end_turn", None),
    ],
)
def test_why_it_stopped_is_said_in_anthropics_words(node: Node, reason: str, sequence: str | None):
    body = orjson.loads(reply_body(node, said(), RENDERER))
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


def test_a_body_has_what_anthropics_clients_read():
    node = replied(REPLIES[0])
    body = orjson.loads(reply_body(node, said(model="claude-x"), RENDERER))
    assert (body["type"], body["role"], body["model"], body["id"]) == ("message", "assistant", "claude-x", f"msg_{node.turn.key}")
    assert (body["usage"]["input_tokens"] + body["usage"]["output_tokens"], body["usage"]["output_tokens"]) == (node.tokens, 2)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"), (413, "request_too_large"),
     (422, "invalid_request_error"), (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error")],
)  # fmt: skip
def test_an_error_has_anthropics_shape(status: int, kind: str):
    assert orjson.loads(error_body("what", "a_code", status, "p")) == {"type": "error", "error": {"type": kind, "message": "what"}}


# The whole way.

WAYS = [f"/sessions/{SID}/v1/messages", "/v1/messages"]


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
async def test_either_route_takes_the_key_in_either_header(path: str, header: str):
    async with door("hello") as d:
        key = KEYS.session(SID)
        headers = {"x-api-key": key, "authorization": ""} if header == "x-api-key" else None
        answer = await d.ask(path, {"max_tokens": 50, "messages": [user("a")]}, headers=headers)
        assert (answer.status, orjson.loads(answer.body)["content"]) == (200, [{"type": "text", "text": "hello"}])


async def test_one_conversation_through_both_dialects_is_one_path_of_turns():
    call_text = '<tool_call>{"name": "bash", "arguments": {"cmd": "ls"}}</tool_call>'
    async with door("one", "two " + call_text, "three", "four") as d:
        system = {"role": "system", "content": "be brief"}
        one = await d.chat(messages=[system, user("a")], tools=[OPENAI_BASH])
        history: list[Any] = [user("a"), {"role": "assistant", "content": [{"type": "text", "text": one["content"]}]}, user("b")]
        two = await d.messages(system="be brief", messages=history, tools=[BASH])
        assert [b["type"] for b in two["content"]] == ["text", "tool_use"]
        used = two["content"][1]
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used["id"], "content": "x.py"}]}
        history += [{"role": "assistant", "content": two["content"]}, result]
        three = await d.messages(system="be brief", messages=history, tools=[BASH])
        calls = [{"id": used["id"], "type": "function", "function": {"name": "bash", "arguments": orjson.dumps(used["input"]).decode()}}]
        back: list[Any] = [{"role": "assistant", "content": "two", "tool_calls": calls}]
        back += [{"role": "tool", "tool_call_id": used["id"], "content": "x.py"}, assistant(three["content"][0]["text"]), user("c")]
        await d.chat(messages=[system, user("a"), one, user("b"), *back], tools=[OPENAI_BASH])
        depths = sorted(n.turn.depth for n in d.host.session(SID).tree.nodes.values())
        assert depths == [1, 2, 3, 4]
        prompts = [ids for ids, _ in d.engine.asked]
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(prompts))


async def test_a_streamed_reply_is_the_turn_that_a_plain_retry_gets():
    async with door("hello") as d:
        body = {"max_tokens": 50, "messages": [user("a")]}
        streamed = await d.ask(WAYS[0], {**body, "stream": True})
        assert streamed.headers["content-type"] == "text/event-stream"
        plain = await d.ask(WAYS[0], body, headers={"x-stainless-retry-count": "1"})
        assert rebuilt(streamed.body) == orjson.loads(plain.body)
        assert (d.turns, plain.headers["x-rollout-ft-outcome"]) == (1, "replayed")


async def test_counted_tokens_are_those_of_the_turn_that_follows():
    async with door("one", "two") as d:
        first = await d.messages(messages=[user("a")])
        history = [user("a"), {"role": "assistant", "content": first["content"]}, user("b")]
        for path in (f"{WAYS[0]}/count_tokens", f"{WAYS[1]}/count_tokens"):
            answer = await d.ask(path, {"model": "m", "messages": history})
            counted = orjson.loads(answer.body)["input_tokens"]
        assert (await d.messages(messages=history))["usage"]["input_tokens"] == counted
        wrong = await d.ask(f"{WAYS[0]}/count_tokens", {"messages": 3})
        assert (wrong.status, orjson.loads(wrong.body)["error"]["type"]) == (400, "invalid_request_error")
        assert d.turns == 2


async def test_errors_have_anthropics_shape_wherever_they_are_found():
    async with door(EngineRefused(400, "the engine says no")) as d:
        body = {"max_tokens": 50, "messages": [user("a")]}
        answers = [
            await d.ask(WAYS[0], body, key="wrong"),
            await d.ask(WAYS[0], {**body, "messages": []}),
            await d.ask(WAYS[0], body),
            await d.ask(WAYS[0] + "/count_tokens", {}, key="wrong"),
        ]
        found = [(a.status, orjson.loads(a.body)["type"], a.error["type"]) for a in answers]
        assert found == [
            (401, "error", "authentication_error"),
            (400, "error", "invalid_request_error"),
            (400, "error", "invalid_request_error"),
            (401, "error", "authentication_error"),
        ]


async def test_a_prompt_that_is_too_long_is_said_in_the_words_of_all_clients():
    async with door(model={"context_tokens": 70}, session={"max_output_tokens": 16}) as d:
        body: Any = {"max_tokens": 5, "messages": [user("a" * 100)]}
        told = await d.ask(WAYS[0], body)
        assert told.status == 400
        assert told.error["message"].startswith("prompt is too long: This model's maximum context length is 64 tokens")
        other = await d.ask(f"/sessions/{SID}/v1/chat/completions", body)
        assert (other.status, other.error["code"]) == (400, "context_length_exceeded")
        assert other.error["message"].startswith("This model's maximum context length is 64 tokens")


# Anything at all.

WORDS = st.sampled_from(["role", "content", "type", "text", "thinking", "name", "input", "tool_use", "tool_result", "id", "user", "auto"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result"]) | VALUES},
    optional={"text": VALUES, "id": WORDS, "tool_use_id": WORDS, "name": WORDS, "input": VALUES, "content": VALUES, "is_error": VALUES},
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | VALUES, "content": WORDS | st.lists(BLOCK, max_size=3)})
FIELDS = st.sampled_from(["system", "tools", "tool_choice", "thinking", "stream", "stop_sequences", "temperature", "model"])


@settings(max_examples=200, deadline=None)
@given(st.lists(MESSAGE | VALUES, max_size=3), st.dictionaries(FIELDS, VALUES, max_size=2))
def test_any_json_is_a_request_or_a_bad_request(messages: Any, fields: Any):
    with contextlib.suppress(BadRequest):
        turn = said(messages=messages, **fields).turn
        assert turn.digests == running_digests(turn.tools, turn.messages)
        make_session().decide(turn)
