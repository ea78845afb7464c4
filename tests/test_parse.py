"""Sampled ids to the assistant's message."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from conftest import ask, begin, make_session, turn_of, user
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.config import ModelConfig
from rollout_ft.engine.parsers import Own, Parser, TextParser, choose
from rollout_ft.errors import BadRequest
from rollout_ft.session.calls import Call, calls_of, extent
from rollout_ft.session.canonical import message_key
from rollout_ft.session.hermes import reasoning, tool_calls
from rollout_ft.session.parse import assistant_message, opened_thinking, sampled_text
from rollout_ft.session.tool_choice import tool_choice_schema
from rollout_ft.session.tree import ids_bytes
from rollout_ft.testing.plain import START, STOP, PlainTemplate

RENDERER = PlainTemplate()
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
OWN = TextParser(ModelConfig(reasoning_parser="qwen3"), Own(), Own())


def said(
    text: str | bytes, *, stop: tuple[str, ...] = (), tools: bool = True, key: str = "k" * 32, end: bool = True,
    parser: Parser = OWN, opened: str = "", forced: bool = False,
) -> dict[str, Any]:  # fmt: skip
    ids = [*(text.encode() if isinstance(text, str) else text), *([STOP] if end else [])]
    sampled = sampled_text(ids, RENDERER, stop=stop)
    parsed = asyncio.run(parser.parse(sampled, TOOLS if tools else None, opened=opened, forced=forced))
    return assistant_message(parsed, key)


def call(source: str) -> str:
    return f"<tool_call>\n{source}\n</tool_call>"


GOOD = call('{"name": "f", "arguments": {"a": 1}}')


def test_plain_text_is_the_content():
    assert said("hello \N{EURO SIGN}") == {"role": "assistant", "content": "hello \N{EURO SIGN}"}


def test_the_stop_token_is_cut_only_at_the_end():
    assert sampled_text([97, STOP, 98], RENDERER, stop=[]) == "ab"


def test_nothing_said_is_empty_content():
    assert said("") == {"role": "assistant", "content": ""}
    assert said("", end=False) == {"role": "assistant", "content": ""}


def test_a_tool_call_is_parsed():
    message = said(GOOD)
    assert message["content"] is None
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}]
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


def test_without_a_parser_a_call_and_reasoning_are_text():
    assert said("<think>a</think>" + GOOD, parser=TextParser(ModelConfig(), None, None))["content"] == "<think>a</think>" + GOOD


@pytest.mark.parametrize(
    "text",
    [
        call("not json"), call("{'name': 'f'}"), call('{"name": "f"'), call("[]"), call('{"arguments": {}}'), call('{"name": 3}'),
        '<tool_call>{"name": "f"}', '{"name": "f", "arguments": {}}', "<tool_call></tool_call>", call('{"name": NaN}'),
        call('{"name": "\\ud800"}'), call("{" * 2000), call('{"name": ""}'), call(',:{"name": "f"}'), call('{"name": "f"} {}'),
        call('{"name": "f", "arguments": ' + "[" * 500 + "]" * 500 + "}"),
    ],
)  # fmt: skip
def test_a_call_that_does_not_parse_stays_text(text: str):
    assert said(text) == {"role": "assistant", "content": text}


def test_a_broken_call_does_not_take_a_good_one_along():
    for broken in (call("{broken}"), "<tool_call>{", '<tool_call>{"name": "'):
        message = said(broken + GOOD)
        assert message["content"] == broken
        assert [c["function"]["name"] for c in message["tool_calls"]] == ["f"]


def test_tags_inside_arguments_are_part_of_them():
    arguments = orjson.dumps({"text": f"so: {GOOD} and <tool_call> or </tool_call>"}).decode()
    made = said(call(f'{{"name": "write", "arguments": {arguments}}}'))
    assert made["content"] is None
    assert made["tool_calls"][0]["function"] == {"name": "write", "arguments": arguments}


@pytest.mark.parametrize(
    "arguments", ["{}", '{"a":{"b":[1,2]}}', '{"a":"}</tool"}', '{ "n": 123456789012345678901234567890, "n": 1.0e+2 }', "[1, 2]", '""', "3"]
)  # fmt: skip
def test_arguments_are_passed_on_as_the_model_wrote_them(arguments: str):
    made = said(call(f'{{"name": "f", "arguments": {arguments}}}'))["tool_calls"][0]["function"]["arguments"]
    assert made == (arguments if arguments != '""' else "")


def test_arguments_that_are_text_already_are_passed_on_as_they_are():
    assert said(call('{"name": "f", "arguments": "{\\"a\\": 1}"}'))["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert said(call('{"name": "f", "arguments": "not json"}'))["tool_calls"][0]["function"]["arguments"] == "not json"


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
        ("  kept \n", (), "  kept \n"),
    ],
)
def test_the_text_is_cut_at_the_first_stop_string_and_nowhere_else(text: str, stop: tuple[str, ...], content: str):
    assert said(text, stop=stop) == {"role": "assistant", "content": content}


def test_a_call_behind_a_stop_string_was_never_made():
    assert said("STOP" + GOOD, stop=("STOP",)) == {"role": "assistant", "content": ""}


def test_bytes_are_decoded_over_all_ids_at_once():
    assert said(b"\xe2\x82\xac") == {"role": "assistant", "content": "\N{EURO SIGN}"}


@pytest.mark.parametrize("cut", range(1, 20))
def test_wherever_a_generation_was_continued_its_text_is_searched_as_one(cut: int):
    ids = [*"12 \N{EURO SIGN} over STOP \N{EURO SIGN}".encode()]
    assert sampled_text(ids[:cut] + ids[cut:], RENDERER, stop=["over STOP"]) == "12 \N{EURO SIGN} "


# Reasoning


def test_reasoning_is_apart_from_the_content():
    assert said("<think>hm\n</think>\n\nyes") == {"role": "assistant", "content": "\n\nyes", "reasoning_content": "hm\n"}


def test_reasoning_that_the_prompt_opened_needs_no_tag():
    assert said("hm</think>yes", opened="<think>") == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert said("hm</think>yes") == {"role": "assistant", "content": "hm</think>yes"}


def test_calls_are_read_behind_the_reasoning_and_not_in_it():
    message = said(f"<think>maybe {GOOD}</think>{GOOD}")
    assert message["reasoning_content"] == f"maybe {GOOD}"
    assert len(message["tool_calls"]) == 1


def test_a_model_that_neither_thought_nor_spoke_said_nothing():
    assert said("<think></think>") == {"role": "assistant", "content": ""}
    assert said("</think>", opened="<think>") == {"role": "assistant", "content": ""}


def test_reasoning_that_does_not_end_is_all_there_is():
    assert said("<think>hm", end=False) == {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert said(f"<think>hm{GOOD}")["tool_calls"][0]["function"]["name"] == "f"


def test_a_stop_string_in_the_reasoning_ends_the_turn_there():
    assert said("<think>a STOP b</think>c", stop=("STOP",)) == {"role": "assistant", "content": "", "reasoning_content": "a "}


@pytest.mark.parametrize(("prompt", "tag"), [("a\n<think>\n", "<think>"), ("<think>\n\n</think>\n\n", ""), ("<think> b", ""), ("", "")])
def test_a_prompt_says_whether_it_opened_the_reasoning(prompt: str, tag: str):
    assert opened_thinking(ids_bytes([*b"x" * 200, *prompt.encode()]), RENDERER) == tag


# Calls that the grammar enforces

FORCED = '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]'


@pytest.mark.parametrize("opened", ["", "<think>"])
@pytest.mark.parametrize("thought", ["", "<think>hm</think>"])
def test_an_array_that_the_grammar_made_is_tool_calls(opened: str, thought: str):
    message = said(thought + FORCED, forced=True, opened=opened)
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}, {"name": "g", "arguments": "{}"}]
    assert message["content"] is None


@pytest.mark.parametrize("text", [FORCED[:-1], "[]", "3", '[{"parameters": {}}]', '[{"name": "f"}, 3]', "", "{"])
def test_an_array_that_was_cut_short_or_makes_no_calls_is_text(text: str):
    assert said(text, forced=True) == {"role": "assistant", "content": text}


def test_the_same_array_without_a_grammar_is_text():
    assert said(FORCED)["content"] == FORCED


def test_a_single_call_needs_no_array():
    assert calls_of(' {"name": "f", "parameters": {"a": 1}} ') == [Call("f", '{"a": 1}')]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_the_grammar_for_a_named_function_allows_no_other():
    tools = [*TOOLS, {"type": "function", "function": {"name": "g"}}]
    schema = orjson.loads(tool_choice_schema(tools, named("g")))
    assert schema["items"]["properties"] == {"name": {"type": "string", "enum": ["g"]}, "parameters": {"type": "object"}}
    assert schema["minItems"] == 1
    assert "maxItems" not in schema


def test_the_grammar_for_required_allows_every_tool_and_one_call_where_one_is_asked_for():
    schema = orjson.loads(tool_choice_schema([*TOOLS, {"type": "function", "function": {"name": "g"}}], "required", parallel=False))
    assert [s["properties"]["name"]["enum"] for s in schema["items"]["anyOf"]] == [["f"], ["g"]]
    assert schema["maxItems"] == 1


def test_definitions_that_parameters_refer_to_are_where_references_look():
    def tool(name: str, kind: str) -> dict[str, Any]:
        return {"function": {"name": name, "parameters": {"$defs": {"X": {"type": kind}}, "properties": {"x": {"$ref": "#/$defs/X"}}}}}

    assert orjson.loads(tool_choice_schema([tool("f", "string")], named("f")))["$defs"] == {"X": {"type": "string"}}
    with pytest.raises(BadRequest, match="X"):
        tool_choice_schema([tool("f", "string"), tool("g", "integer")], "required")


@pytest.mark.parametrize("choice", [named("nobody"), {}, {"function": 3}, None, "required"])
def test_a_choice_of_nothing_is_refused(choice: Any):
    with pytest.raises(BadRequest) as e:
        tool_choice_schema(TOOLS if choice != "required" else [], choice)
    assert e.value.param == "tool_choice"


# Who parses


@pytest.mark.parametrize(
    ("name", "engine", "installed", "who"),
    [
        ("none", "sglang", True, "nobody"), ("hermes", "small", True, "own"), ("hermes", "sglang", True, "sglang"),
        ("glm45", "small", True, "sglang"), ("glm45", "sglang", False, "engine"), ("hermes", "sglang", False, "engine"),
    ],
)  # fmt: skip
def test_sglang_reads_where_it_is_installed_and_else_the_engine(name: str, engine: str, installed: bool, who: str):
    assert choose(name, frozenset({"hermes"}), engine=engine, installed=installed) == who


# Whatever a model writes

PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", "[", "]", '"', "\\", '"name"', ":", '"f"', "\n", '"arguments"', ",",
     "null", "1", "\xe9", GOOD, call("{broken}")]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, START), max_size=30) | TEXTS.map(lambda t: list(t.encode())), st.booleans(), st.booleans())
def test_whatever_a_model_writes_becomes_a_message_that_clients_and_the_tree_can_hold(ids: list[int], tools: bool, forced: bool):
    made = said(bytes(i for i in ids if i < 256), tools=tools, forced=forced)
    assert made == said(bytes(i for i in ids if i < 256), tools=tools, forced=forced)
    assert isinstance(made["content"], str) or made["tool_calls"]
    assert message_key(orjson.loads(orjson.dumps(made)))


PLAIN = st.lists(st.sampled_from(["a ", "{", "}", '"', "\n", "</tool_call>", "<tool_call>", "<tool_call>{", call("{x}"), "é", "<"])).map(
    "".join
)


@settings(max_examples=300)
@given(st.lists(st.tuples(PLAIN, st.booleans()), max_size=6))
def test_every_character_is_in_the_content_or_in_a_call(parts: list[tuple[str, bool]]):
    text = "".join(plain + (GOOD if called else "") for plain, called in parts)
    plain = "".join(plain for plain, _ in parts)
    content, calls = tool_calls(text)
    assert calls == [Call("f", '{"a": 1}') for _, called in parts if called]
    assert content == (plain.strip() if calls else text)


@settings(max_examples=200)
@given(TEXTS)
def test_reasoning_and_the_rest_are_the_whole_text_but_for_the_tags(text: str):
    thought, rest = reasoning(text)
    assert text.endswith(rest)
    assert text.removesuffix(rest).removesuffix("</think>").endswith(thought)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60).map("".join), st.integers(1, 40))
def test_no_character_is_looked_at_for_more_than_a_few_values(text: str, times: int):
    looked = 0

    def counted(source: str, at: int) -> tuple[int, bool]:
        nonlocal looked
        end, whole = extent(source, at)
        looked += end - at
        return end, whole

    repeated = text * times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout_ft.session.hermes.extent", counted)
        tool_calls(repeated)
    assert looked <= 3 * len(repeated)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 200_000, "<tool_call>{" * 100_000, '<tool_call>{"a":"' * 50_000, "<tool_call>" + "[" * 1_000_000,
        "<tool_call>" + " " * 1_000_000, '<tool_call>"' + "\\" * 1_000_000, "</think>" * 200_000, "<think>" * 200_000,
        "<tool_call>" + '{"name":' * 10_000, "<tool_call>" + "1" * 1_000_000, GOOD * 5_000, '<tool_call>["\\"' * 50_000,
    ],
    ids=lambda text: text[:18] + str(len(text)),
)  # fmt: skip
def test_megabytes_that_are_made_to_be_slow_to_read_are_read(text: str):
    content, calls = tool_calls(text)
    assert calls or content == text
    reasoning(text)
    assert calls_of(text) is None


def test_a_turn_with_any_reply_enters_the_tree():
    session = make_session()
    node = session.committed(turn_of(begin(session, ask(user("a"))), GOOD, session))
    assert node.tokens > len(GOOD)
