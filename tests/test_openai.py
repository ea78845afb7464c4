"""OpenAI's dialect: what a body may say, and that a turn always becomes the same reply."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import orjson
import pytest
from conftest import ask, begin, commit, make_session, play, turn_of, user
from door import door
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway import CHAT

from rollout_ft.errors import BadRequest, EngineRefused
from rollout_ft.gateway.dialects import Evidence, Rules
from rollout_ft.gateway.dialects.openai_reply import ChatRequest, error_body, models_body, reply_body, reply_events
from rollout_ft.gateway.dialects.openai_request import parse_chat
from rollout_ft.gateway.dialects.sampling import session_sampling
from rollout_ft.session.canonical import message_key
from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node
from rollout_ft.testing.plain import PlainTemplate

RENDERER = PlainTemplate()
MESSAGES = [user("a")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def parse(body: Any, forced: dict[str, Any] | None = None, evidence: Evidence | None = None, *, force: bool = True) -> ChatRequest:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    rules = Rules("t1~1", session_sampling(forced or {}), force, max_messages=5, max_output_tokens=100)
    return parse_chat(data, evidence or Evidence("r1"), rules)


def chat(**fields: Any) -> ChatRequest:
    return parse({"messages": MESSAGES, **fields})


def refused(body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as e:
        parse(body)
    assert e.value.status == 400
    assert len(str(e.value).splitlines()) == 1
    return e.value


# What is refused.


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"messages": NaN}', b'{"temperature": Infinity}', b'{"model": "\\ud800"}', b'{"model": "\xff"}',
     b"[" * 10_000 + b"]" * 10_000, b'{"messages": ' * 10_000, b"null", b"[]", b"3", b'"a"', b"true", b'{"a": 1} {"b": 2}'],
    ids=lambda b: repr(b[:20]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body: bytes):
    assert refused(body).code == "invalid_json"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("messages", [None, [], "a", 3, {}, MESSAGES * 6]),
        ("tools", ["f", 3, {}, [3], [None], [{}], [{"function": None}], [{"function": {}}], [{"function": {"name": 3}}]]),
        ("tool_choice", ["required", {"type": "function", "function": {"name": "f"}}, {"type": "allowed_tools"}, {}, "f", 3, [], True]),
        ("temperature", ["1", -1, 101, True, [], {}]),
        ("top_p", ["1", -0.1, 1.1, True, 0]),
        ("top_k", [1.5, "1", -2, True, 0]),
        ("min_p", [2, "0"]),
        ("frequency_penalty", [3, -3, "0"]),
        ("presence_penalty", [3, -3, []]),
        ("repetition_penalty", [-1, 11, "1"]),
        ("max_tokens", [0, -1, 1.5, "10", True, []]),
        ("max_completion_tokens", [0, -1, 1.5, "10", True]),
        ("stop", [3, [3], [""], ["a", None], {"a": 1}]),
        ("seed", ["1", 1.5, True, []]),
        ("n", [0, 2, "1", [], -1]),
        ("stream", ["true", 1, 0, []]),
        ("stream_options", ["usage", 3, [1]]),
        ("logprobs", ["true", 1, 5]),
        ("top_logprobs", [1, 20, True, False]),
        ("response_format", [{}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}, "text", [], {"type": "grammar"}]),
        ("chat_template_kwargs", [3, [], {"add_generation_prompt": False}, {"messages": []}, {"tools": None}, {"tokenize": True}]),
        ("reasoning_effort", ["much", 3, ""]),
        ("session_id", ["t1~2", "", 3]),
        ("return_token_ids", [1, "true"]),
        ("parallel_tool_calls", [1, "false"]),
        ("stop_token_ids", [3, [-1], ["1"], [True], [1.0]]),
        ("skip_special_tokens", [False, 1]),
        ("model", [3, []]),
        ("ignore_eos", ["true", 1]),
        ("min_tokens", ["1", 1.5, True, -1]),
        ("functions", [[], None]),
        ("logit_bias", [{"1": 5}]),
    ],
)
def test_a_field_with_a_wrong_value_is_named(field: str, values: list[Any]):
    for value in values:
        e = refused({"messages": MESSAGES, field: value})
        names = {"max_completion_tokens": "max_tokens"}
        assert {field, names.get(field)} & {(e.param or "").partition("[")[0]}, value


@pytest.mark.parametrize(
    "message",
    [3, None, "a", [], {}, {"role": "robot", "content": "a"}, {"role": None}, {"role": 3}, {"role": []}, {"role": {}},
     {"role": "user", "content": 3}, {"role": "user", "content": {"type": "text"}},
     {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
     {"role": "user", "content": [{"type": "input_audio"}]}, {"role": "user", "content": [{"type": "text", "text": 3}]},
     {"role": "user", "content": ["a"]}, {"role": "user", "content": [{"type": []}]},
     {"role": "assistant", "tool_calls": 3}, {"role": "assistant", "tool_calls": [3]}, {"role": "assistant", "tool_calls": [{}]},
     {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
    ids=lambda m: orjson.dumps(m).decode()[:40],
)  # fmt: skip
def test_a_message_that_cannot_be_rendered_is_named_with_its_index(message: Any):
    e = refused({"messages": [user("a"), message]})
    assert "messages[1]" in (e.param or "")


def deep(body: bytes, depth: int) -> bytes:
    """The body with `@` replaced by a list of lists of lists."""
    return body.replace(b"@", b"[" * depth + b"]" * depth)


@pytest.mark.parametrize("depth", [300, 1000])
@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "f", "parameters": @}}]}',
        b'{"messages": [{"role": "user", "content": "a", "name": @}]}',
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": @}}]}]}',
    ],
    ids=["tools", "name", "arguments"],
)
def test_what_is_nested_too_deep_to_be_written_again_is_refused(body: bytes, depth: int):
    refused(deep(body, depth))


def test_the_text_of_arguments_may_be_nested_as_deep_as_it_likes():
    text = deep(b"@", 300).decode()
    chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}])


def test_an_unknown_field_is_named():
    e = refused({"messages": MESSAGES, "temprature": 1})
    assert (e.code, e.param) == ("unknown_field", "temprature")


def test_more_tokens_demanded_than_allowed_are_refused():
    assert refused({"messages": MESSAGES, "min_tokens": 50, "max_tokens": 10}).param == "min_tokens"


# What is accepted.


def test_fields_that_mean_nothing_here_are_ignored():
    fields = {"model": "m", "user": "u", "metadata": {"a": 1}, "store": False, "parallel_tool_calls": True}
    assert chat(**fields).turn == chat().turn


@pytest.mark.parametrize("field", ["temperature", "stop", "seed", "max_tokens", "tools", "n", "stream", "logprobs", "response_format"])
def test_null_is_the_same_as_not_said(field: str):
    assert chat(**{field: None}) == chat()


def test_sampling_is_passed_on_under_the_engines_names():
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_tokens": 7, "stop": "x", "seed": 3, "min_tokens": 2, "ignore_eos": True}
    assert chat(**fields).turn.sampling == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_new_tokens": 7, "stop": ["x"], "sampling_seed": 3,
        "min_new_tokens": 2, "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "limit"), [({}, 100), ({"max_tokens": 200}, 100), ({"max_tokens": 1}, 1), ({"max_completion_tokens": 9}, 9)]
)
def test_the_limit_of_tokens_is_the_agents_within_the_configs(said: dict[str, int], limit: int):
    assert chat(**said).turn.sampling["max_new_tokens"] == limit


def test_forced_sampling_wins_over_the_agents():
    forced = {"temperature": 1.0, "max_new_tokens": 50}
    request = parse({"messages": MESSAGES, "temperature": 0.1, "max_tokens": 3, "top_p": 0.5}, forced)
    assert request.turn.sampling == {"temperature": 1.0, "max_new_tokens": 50, "top_p": 0.5}


def test_a_forced_stop_string_is_one_string_and_not_its_letters():
    assert parse({"messages": MESSAGES}, {"stop": "END"}).turn.sampling["stop"] == ["END"]


def test_tools_are_a_part_of_what_the_conversation_is_unless_none_may_be_called():
    assert chat(tools=[TOOL]).turn.digests != chat().turn.digests
    assert chat(tools=[TOOL], tool_choice="none").turn == chat().turn
    assert chat(tools=[TOOL], tool_choice="auto").turn == chat(tools=[TOOL]).turn


def test_the_evidence_of_the_headers_is_the_turns():
    turn = parse({"messages": MESSAGES}, evidence=Evidence("r9", True, "key", True)).turn
    assert (turn.request_id, turn.retry, turn.idempotency_key, turn.resent) == ("r9", True, "key", True)


def test_a_default_of_the_session_holds_only_for_what_the_agent_does_not_say():
    own = {"temperature": 1.0, "max_tokens": 50, "stop": ["END"]}
    request = parse({"messages": MESSAGES, "temperature": 0.1, "max_tokens": 3}, own, force=False)
    assert request.turn.sampling == {"temperature": 0.1, "max_new_tokens": 3, "stop": ["END"]}


def test_a_default_of_the_session_is_bounded_by_the_config_too():
    assert parse({"messages": MESSAGES, "max_tokens": 200}, {"max_tokens": 300}, force=False).turn.sampling["max_new_tokens"] == 100


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_a_demanded_form_is_a_grammar_for_the_engine(form: Any, schema: Any):
    assert orjson.loads(chat(response_format=form).turn.sampling["json_schema"]) == schema


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_demanded_call_is_a_grammar_for_the_engine(choice: Any):
    turn = chat(tools=[TOOL], tool_choice=choice).turn
    assert turn.forced_call
    assert "json_schema" in turn.engine_sampling
    assert not chat(tools=[TOOL]).turn.forced_call


def test_a_demanded_call_and_a_demanded_form_exclude_each_other():
    body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert refused(body).param == "response_format"


def test_a_tool_that_is_not_there_cannot_be_demanded():
    choice = {"type": "function", "function": {"name": "g"}}
    assert refused({"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice}).param == "tool_choice"


def test_one_call_at_most_is_refused_where_it_cannot_be_enforced():
    assert refused({"messages": MESSAGES, "tools": [TOOL], "parallel_tool_calls": False}).param == "parallel_tool_calls"
    chat(parallel_tool_calls=False)
    chat(tools=[TOOL], parallel_tool_calls=False, tool_choice="none")
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        assert '"maxItems":1' in chat(tools=[TOOL], parallel_tool_calls=False, tool_choice=choice).turn.sampling["json_schema"]


@pytest.mark.parametrize(
    ("said", "kwargs"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
        ({"chat_template_kwargs": {}}, {}),
    ],
)
def test_arguments_of_the_chat_template_make_it_another_turn_and_never_reach_the_engine(said: Any, kwargs: Any):
    turn = chat(**said).turn
    assert turn.template_kwargs == kwargs
    assert turn.engine_sampling == chat().turn.sampling
    assert turn.digests == chat().turn.digests
    assert (turn.sampling == chat().turn.sampling) == (not kwargs)


@pytest.mark.parametrize(
    "field",
    ["input_ids", "rid", "session_params", "lora_path", "custom_logit_processor", "bootstrap_host", "bootstrap_room",
     "return_hidden_states", "priority", "extra_key", "cache_salt", "routed_dp_rank", "custom_params", "regex", "ebnf",
     "stop_regex", "functions", "audio", "prompt"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 1, "x", [1], {}])
def test_a_field_of_an_engine_is_refused_whatever_it_says(field: str, value: Any):
    e = refused({"messages": MESSAGES, field: value})
    assert (e.code, e.param) == ("unknown_field", field)


def test_a_session_may_be_named_in_the_body_if_it_is_the_keys():
    assert chat(session_id="t1~1") == chat()


def test_what_is_only_ever_served_one_way_may_be_asked_for_that_way():
    assert chat(n=1, top_logprobs=0, logit_bias={}, modalities=["text"], skip_special_tokens=True, separate_reasoning=True) == chat()


@pytest.mark.parametrize("options", [{"usage": True}, {"continuous_usage_stats": True}, {"include_usage": 1}])
def test_an_option_of_a_stream_that_is_not_known_is_named(options: Any):
    assert "usage" in (refused({"messages": MESSAGES, "stream": True, "stream_options": options}).param or "")


def test_token_ids_are_for_plain_replies_only():
    assert refused({"messages": MESSAGES, "stream": True, "return_token_ids": True}).param == "return_token_ids"


def test_more_tools_than_allowed_are_refused():
    assert refused({"messages": MESSAGES, "tools": [TOOL] * 513}).param == "tools"


# Replies.


def replied(text: str, message: dict[str, Any] | None = None) -> Node:
    session = make_session()
    flight = begin(session, ask(user("question")))
    turn = turn_of(flight, text, session)
    return session.committed(replace(turn, reply=orjson.dumps(message)) if message else turn)


CALLS = [
    {"id": f"call_{i}", "type": "function", "function": {"name": "f", "arguments": f'{{"n":{i}}}'}} for i in range(3)
]  # fmt: skip
REPLIES = [
    {"role": "assistant", "content": "hello \N{EURO SIGN}\n"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": None, "tool_calls": CALLS[:1]},
    {"role": "assistant", "content": "I look it up", "tool_calls": CALLS},
    {"role": "assistant", "content": "so", "reasoning_content": "hm"},
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": CALLS[:1]},
]


def events(data: bytes) -> list[Any]:
    *sent, done, nothing = data.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    return [orjson.loads(e.removeprefix(b"data: ")) for e in sent]


def rebuilt(data: bytes) -> dict[str, Any]:
    """The message, as clients put it together from the deltas."""
    message: dict[str, Any] = {"content": ""}
    calls: dict[int, dict[str, Any]] = {}
    for event in events(data):
        for choice in event["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role", message.get("role"))
            message["content"] += delta.get("content") or ""
            if delta.get("reasoning_content"):
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            for call in delta.get("tool_calls") or ():
                calls[call["index"]] = {k: v for k, v in call.items() if k != "index"}
    return {**message, "tool_calls": [calls[i] for i in range(len(calls))]} if calls else message


@pytest.mark.parametrize("message", REPLIES)
def test_a_body_holds_the_recorded_message(message: dict[str, Any]):
    body = orjson.loads(reply_body(replied("x", message), chat(), RENDERER))
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == message


@pytest.mark.parametrize("message", REPLIES)
def test_the_events_of_a_turn_rebuild_the_message_of_its_body(message: dict[str, Any]):
    back = rebuilt(reply_events(replied("x", message), chat(), RENDERER))
    assert message_key(back) == message_key(message)
    assert back.get("tool_calls") == message.get("tool_calls")
    assert back.get("reasoning_content") == message.get("reasoning_content")


def test_streamed_tool_calls_count_their_indexes_from_zero():
    data = reply_events(replied("x", REPLIES[3]), chat(), RENDERER)
    found = [c["index"] for e in events(data) for choice in e["choices"] for c in choice["delta"].get("tool_calls", ())]
    assert found == [0, 1, 2]


@pytest.mark.parametrize(("message", "reason"), [(REPLIES[0], "stop"), (REPLIES[2], "tool_calls")])
def test_body_and_events_end_for_the_same_reason_said_once(message: dict[str, Any], reason: str):
    node = replied("x", message)
    assert orjson.loads(reply_body(node, chat(), RENDERER))["choices"][0]["finish_reason"] == reason
    reasons = [c["finish_reason"] for e in events(reply_events(node, chat(), RENDERER)) for c in e["choices"]]
    assert [r for r in reasons if r] == [reason] == reasons[-1:]


def test_the_first_event_names_the_role():
    assert events(reply_events(replied("x"), chat(), RENDERER))[0]["choices"][0]["delta"]["role"] == "assistant"


def test_events_come_in_the_order_role_reasoning_content_calls_finish():
    message = {**REPLIES[3], "reasoning_content": "hm"}
    found = [sorted(c["delta"]) for e in events(reply_events(replied("x", message), chat(), RENDERER)) for c in e["choices"]]
    assert found == [["content", "role"], ["reasoning_content"], ["content"], *[["tool_calls"]] * 3, []]


def test_a_turn_that_was_cut_off_in_its_calls_says_so():
    session = make_session()
    turn = replace(turn_of(begin(session, ask(user("a"))), "x", session), reply=orjson.dumps(REPLIES[2]), finish_reason="length")
    assert orjson.loads(reply_body(session.committed(turn), chat(), RENDERER))["choices"][0]["finish_reason"] == "length"


def test_token_ids_are_what_the_engine_was_given_and_what_it_gave():
    session = make_session()
    play(session, ask(user("a")), "x")
    flight = begin(session, ask(user("a"), {"role": "assistant", "content": "x"}, user("b")))
    node = commit(session, flight, "yes")
    choice = orjson.loads(reply_body(node, chat(return_token_ids=True), RENDERER))["choices"][0]
    assert choice["prompt_token_ids"] == orjson.loads(b"[" + flight.input_json + b"]")
    assert choice["response_token_ids"] == [*b"yes", 257]
    assert "prompt_token_ids" not in orjson.loads(reply_body(node, chat(), RENDERER))["choices"][0]


def test_a_reply_names_the_model_that_was_asked_for_or_the_configs():
    node = replied("x")
    assert orjson.loads(reply_body(node, chat(model="m"), RENDERER))["model"] == "m"
    assert {e["model"] for e in events(reply_events(node, chat(), RENDERER))} == {"default"}


def test_the_model_is_listed_with_its_context():
    (listed,) = orjson.loads(models_body("m", 4096))["data"]
    assert (listed["id"], listed["object"], listed["max_model_len"]) == ("m", "model", 4096)


def test_usage_counts_all_tokens_of_the_path():
    session = make_session()
    play(session, ask(user("a")), "x")
    node = play(session, ask(user("a"), {"role": "assistant", "content": "x"}, user("b")), "yes")
    usage = orjson.loads(reply_body(node, chat(), RENDERER))["usage"]
    sampled = len(b"yes") + 1
    assert usage == {"prompt_tokens": node.tokens - sampled, "completion_tokens": sampled, "total_tokens": node.tokens}


def test_usage_is_streamed_where_it_is_asked_for_in_an_event_without_choices():
    node = replied("x")
    usage = orjson.loads(reply_body(node, chat(), RENDERER))["usage"]
    asked = events(reply_events(node, chat(stream_options={"include_usage": True}), RENDERER))
    assert (asked[-1]["choices"], asked[-1]["usage"]) == ([], usage)
    assert all("usage" not in e for e in events(reply_events(node, chat(), RENDERER)))


def test_logprobs_are_one_per_sampled_token_in_both_forms():
    node = replied("abc")
    body = orjson.loads(reply_body(node, chat(logprobs=True), RENDERER))["choices"][0]["logprobs"]
    assert [e["token"] for e in body["content"]] == ["a", "b", "c", ""]
    assert all(e["logprob"] == 0 for e in body["content"])
    streamed = events(reply_events(node, chat(logprobs=True), RENDERER))
    assert [e["logprobs"] for event in streamed for e in event["choices"] if e["logprobs"]] == [body]


def test_without_being_asked_for_logprobs_are_null():
    assert orjson.loads(reply_body(replied("abc"), chat(), RENDERER))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("message", REPLIES)
@pytest.mark.parametrize("make", [reply_body, reply_events])
def test_the_same_turn_is_the_same_bytes_in_every_process_that_holds_it(make: Any, message: dict[str, Any]):
    session: Session = make_session()
    turn = replace(turn_of(begin(session, ask(user("a"))), "x", session), reply=orjson.dumps(message))
    here, there = session.committed(turn), make_session().committed(turn)
    assert make(here, chat(), RENDERER) == make(there, chat(), RENDERER)


@pytest.mark.parametrize("message", REPLIES)
def test_what_a_client_sends_back_extends_the_turn_it_got(message: dict[str, Any]):
    session = make_session()
    flight = begin(session, ask(user("a")))
    node = session.committed(replace(turn_of(flight, "x", session), reply=orjson.dumps(message)))
    back = rebuilt(reply_events(node, chat(), RENDERER))
    assert begin(session, ask(user("a"), back, user("b"))).parent is node


def test_different_turns_have_different_ids():
    session = make_session()
    one, other = play(session, ask(user("a")), "x"), play(session, ask(user("a")), "x")
    ids = {orjson.loads(reply_body(n, chat(), RENDERER))["id"] for n in (one, other)}
    assert len(ids) == 2


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (404, "invalid_request_error"), (503, "server_error")])
def test_an_error_has_openais_shape(status: int, kind: str):
    body = orjson.loads(error_body("what", "a_code", status, "field"))
    assert body == {"error": {"message": "what", "type": kind, "code": "a_code", "param": "field"}}


# The whole way.


@pytest.mark.parametrize("path", [CHAT, "/v1/chat/completions"])
async def test_a_streamed_reply_is_the_turn_that_a_plain_retry_gets(path: str):
    async with door("hello") as d:
        streamed = await d.ask(path, {"messages": MESSAGES, "stream": True})
        plain = await d.ask(path, {"messages": MESSAGES}, headers={"x-stainless-retry-count": "1"})
        message = orjson.loads(plain.body)["choices"][0]["message"]
        assert (rebuilt(streamed.body), d.turns) == (message, 1)


async def test_the_sessions_parameters_win_or_are_defaults_and_the_used_ones_are_recorded():
    for policy, used in (("force", 1.0), ("default", 0.2)):
        async with door("a", sampling={"policy": policy, "parameters": {"temperature": 0.7}}, spec={"sampling": {"temperature": 1.0}}) as d:
            await d.chat(messages=MESSAGES, temperature=0.2, chat_template_kwargs={"enable_thinking": False})
            ((_, sampling),) = d.engine.asked
            (node,) = d.host.session("t1~1").tree.nodes.values()
            assert (sampling["temperature"], orjson.loads(node.turn.sampling)["temperature"]) == (used, used)
            assert "chat_template_kwargs" not in sampling


async def test_an_engine_that_knows_a_smaller_context_says_so_in_the_words_that_clients_know():
    said = "Requested token count exceeds the model's maximum context length of 64 tokens."
    async with door(EngineRefused(400, said)) as d:
        answer = await d.ask(CHAT, {"messages": MESSAGES})
        assert (answer.status, answer.error["code"], answer.error["message"]) == (400, "context_length_exceeded", said)


async def test_the_models_of_a_session_are_the_configs():
    async with door(model={"name": "policy", "context_tokens": 20_000}) as d:
        for path in ("/sessions/t1~1/v1/models", "/v1/models"):
            (listed,) = orjson.loads((await d.ask(path)).body)["data"]
            assert (listed["id"], listed["max_model_len"]) == ("policy", 20_000)
        assert (await d.ask("/v1/models", key="wrong")).status == 401


# Anything at all.

KNOWN = [
    "messages", "tools", "tool_choice", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "seed", "n",
    "logprobs", "top_logprobs", "response_format", "ignore_eos", "min_tokens", "temperature", "top_p", "top_k", "model", "user",
    "chat_template_kwargs", "reasoning_effort", "return_token_ids", "parallel_tool_calls", "stop_token_ids",
]  # fmt: skip
WORDS = st.sampled_from(["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "user", "{}", "auto"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | VALUES}, optional={"content": VALUES, "tool_calls": VALUES}
)
BODIES = st.dictionaries(st.sampled_from(KNOWN), VALUES, max_size=3).flatmap(
    lambda body: st.lists(MESSAGE, min_size=1, max_size=2).map(lambda messages: {"messages": messages, **body})
)


@settings(max_examples=150, deadline=None)
@given(BODIES | VALUES)
def test_any_json_is_a_request_or_a_bad_request(body: Any):
    with contextlib.suppress(BadRequest):
        request = parse(body)
        make_session().decide(request.turn)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_request_or_a_bad_request(body: bytes):
    with contextlib.suppress(BadRequest):
        parse(body)


@settings(max_examples=60, deadline=None)
@given(BODIES)
def test_a_body_parsed_twice_is_the_same_request(body: Any):
    with contextlib.suppress(BadRequest, TypeError):
        assert parse(body) == parse(body)


def test_a_committed_turn_survives_being_asked_for_in_another_order_of_keys():
    session = make_session()
    first = parse(b'{"messages": [{"role": "user", "content": "a"}], "temperature": 0.5, "top_p": 0.9}')
    node = commit(session, begin(session, first.turn), "x")
    again = parse(b'{"top_p": 0.9, "messages": [{"content": "a", "role": "user"}], "temperature": 0.5}', evidence=Evidence("r2"))
    assert session.decide(again.turn).node is node  # type: ignore[union-attr]
