"""Parsers that are not ours, through our port: the engine's endpoints, and SGLang's own where sglang is installed.

`make test-parsers` runs all of it in an environment that has sglang.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ports import free_port

from rollout_ft.config import Config, ModelConfig
from rollout_ft.engine.parsers import EngineParsers, Reader, TextParser, check_names, make_parser, read_calls, sglang_dir, start_sglang
from rollout_ft.engine.sglang import SGLang
from rollout_ft.engine.sglang_parsers import SGLangParsers
from rollout_ft.errors import ConfigError, EngineLost
from rollout_ft.session.calls import Call
from rollout_ft.session.hermes import reasoning, tool_calls
from rollout_ft.session.parse import Parsed
from rollout_ft.session.tool_choice import tool_choice_schema
from rollout_ft.testing.small_engine import parsing

needs_sglang = pytest.mark.skipif(sglang_dir() is None, reason="sglang is not installed: make test-parsers")
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
]


def call(source: str) -> str:
    return f"<tool_call>\n{source}\n</tool_call>"


GOOD, UNKNOWN, BROKEN = call('{"name": "f", "arguments": {"a": 1}}'), call('{"name": "nobody", "arguments": {}}'), call("{broken}")
MADE = Call("f", '{"a": 1}')


# The engine's endpoints.


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "rollout_ft.testing.small_engine", "--port", str(port), "--model", "hash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert "ready" in process.stdout.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture
async def engine(url: str) -> AsyncIterator[SGLang]:
    engine = SGLang("e0", url)
    yield engine
    await engine.aclose()


def asking(engine: SGLang, tool_parser: str = "qwen25", reasoning_parser: str = "qwen3") -> EngineParsers:
    return EngineParsers(engine, ModelConfig(tool_parser=tool_parser, reasoning_parser=reasoning_parser))


@pytest.mark.parametrize("parser", ["hermes", "qwen25"])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (GOOD, "", [MADE]), (f"before {GOOD}", "before", [MADE]), (f"a {GOOD} b {GOOD} c", "a  b  c", [MADE, MADE]),
        (BROKEN, BROKEN, []), (UNKNOWN, UNKNOWN, []), (GOOD + UNKNOWN, UNKNOWN, [MADE]), (f"x {BROKEN} {GOOD}", f"x {BROKEN}", [MADE]),
        ("<tool_call>", "<tool_call>", []), ("plain", "plain", []), (GOOD + "<tool_call>{", "<tool_call>{", [MADE]),
    ],
)  # fmt: skip
async def test_what_the_engines_parser_drops_is_text(engine: SGLang, parser: str, text: str, content: str, calls: list[Call]):
    assert await read_calls(asking(engine, parser), text, TOOLS) == (content, calls, False)


async def test_the_engine_separates_reasoning_also_where_the_prompt_opened_it(engine: SGLang):
    parser = TextParser(ModelConfig(), asking(engine), asking(engine))
    expected = Parsed("", "hm", (MADE,))
    assert await parser.parse(f"<think>hm</think>{GOOD}", TOOLS) == expected
    assert await parser.parse(f"hm</think>{GOOD}", TOOLS, opened="<think>") == expected
    assert await parser.parse("plain", TOOLS) == Parsed("plain")


async def test_a_parser_that_the_engine_does_not_know_is_found_at_the_start_and_never_loses_a_turn(engine: SGLang):
    for tool_parser, reasoning_parser in (("nosuch", "qwen3"), ("qwen25", "nosuch")):
        asked = asking(engine, tool_parser, reasoning_parser)
        with pytest.raises(EngineLost, match="nosuch"):
            await asked.check("e0", True, True)
    asked = asking(engine, "nosuch", "nosuch")
    assert await TextParser(ModelConfig(), asked, asked).parse(GOOD, TOOLS) == Parsed(GOOD, failed=True)
    await asking(engine).check("e0", True, True)


async def test_a_connection_that_breaks_is_the_engines_loss_and_no_text():
    engine = SGLang("e0", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineLost):
        await read_calls(asking(engine), GOOD, TOOLS)
    await engine.aclose()


class Fails:
    async def calls(self, texts: Any, tools: Any) -> Any:
        return [None for _ in texts]

    async def reasoning(self, text: str) -> Any:
        return None

    async def markers(self) -> tuple[str, str]:
        return "<tool_call>", "</tool_call>"


async def test_what_nobody_can_read_is_text_and_counted():
    parsed = await TextParser(ModelConfig(), Fails(), Fails()).parse("<think>a</think>" + GOOD, TOOLS)
    assert parsed == Parsed("<think>a</think>" + GOOD, failed=True)


async def test_the_small_engines_formats_are_read_here_and_nobody_is_asked(engine: SGLang):
    config = Config.model_validate({"model": {"reasoning_parser": "qwen3"}})
    assert await start_sglang(config, {}) is None
    parser = await make_parser(config, "e0", SGLang("e0", "http://127.0.0.1:1"), None)
    assert await parser.parse(f"<think>hm</think>{GOOD}{UNKNOWN}", TOOLS) == Parsed("", "hm", (MADE, Call("nobody", "{}")))


# SGLang's own parsers.

DEEPSEEK = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
HARMONY = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
FORMATS = {
    "hermes": GOOD, "qwen25": GOOD, "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "llama3": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
    "deepseekv3": f"<｜tool▁calls▁begin｜>{DEEPSEEK}<｜tool▁calls▁end｜>",
    "gpt-oss": f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{HARMONY}",
}  # fmt: skip
REASONING = {"gpt-oss": "gpt-oss", "deepseekv3": "deepseek-v3"}


class Parsers:
    """Processes that are started once for all tests; each runs in one event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._started: dict[str, SGLangParsers] = {}

    def reader(self, name: str) -> SGLangParsers:
        if name not in self._started:
            self._started[name] = SGLangParsers(name, REASONING.get(name, "qwen3"), dict(os.environ))
            self.run(self._started[name].start())
        return self._started[name]

    def run(self, what: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(what)

    def parse(self, name: str, text: str) -> Parsed:
        reader: Reader = self.reader(name)
        config = ModelConfig(tool_parser=name, reasoning_parser=REASONING.get(name, "qwen3"))
        return self.run(TextParser(config, reader, reader).parse(text, TOOLS))

    def close(self) -> None:
        for reader in self._started.values():
            self.run(reader.aclose())
        self.loop.close()


@pytest.fixture(scope="module")
def sglang() -> Iterator[Parsers]:
    parsers = Parsers()
    yield parsers
    parsers.close()


@needs_sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FORMATS)
def test_a_call_of_each_format_is_read(sglang: Parsers, name: str):
    parsed = sglang.parse(name, FORMATS[name])
    assert parsed.calls == (MADE,)
    assert (parsed.content, parsed.failed) == ("", False)
    assert parsed.reasoning == ("hm" if name == "gpt-oss" else "")
    assert sglang.parse(name, "plain text").content == "plain text"


@needs_sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["hermes", "qwen25"])
@pytest.mark.parametrize(
    "text",
    [
        GOOD, f"before {GOOD}", GOOD + "\n" + GOOD, f"a {GOOD} b {GOOD} c", UNKNOWN, GOOD + UNKNOWN, BROKEN, GOOD + BROKEN, "<tool_call>",
        f"<think>hm</think>\n\n{GOOD}", "<think>hm</think>yes", "<think>hm", f"<think>hm{GOOD}", "plain", "", " \n",
        call('{"name": "f", "arguments": {"a": "\N{EURO SIGN}"}}'), call('{"name": "f", "parameters": {"a": 2}}'), call('{"name": "f"}'),
    ],
)  # fmt: skip
def test_ours_and_sglangs_read_the_same(sglang: Parsers, name: str, text: str):
    thought, rest = reasoning(text)
    content, calls = tool_calls(rest)
    assert sglang.parse(name, text) == Parsed(content, thought, tuple(calls))


@needs_sglang
@pytest.mark.timeout(300)
def test_the_small_engines_endpoints_find_what_sglangs_parsers_find(sglang: Parsers, monkeypatch: pytest.MonkeyPatch):
    for name in ("hermes", "qwen25"):
        for text in (GOOD, f"a {GOOD} b", GOOD + BROKEN, BROKEN, "plain", "<tool_call>", GOOD + "<tool_call>\n{", f"x{GOOD}y{GOOD}z"):
            (found,) = sglang.run(sglang.reader(name).calls([text], TOOLS))
            content, calls = parsing.function_calls(text, TOOLS, name)
            assert found == (content, [Call(c["name"], c["parameters"]) for c in calls])
    for text in ("<think>a</think>b", "<think>a", f"<think>a{GOOD}", "a</think>b", "b", "x <think>a</think>b", "<think><think>a</think>b"):
        assert sglang.run(sglang.reader("hermes").reasoning(text)) == parsing.separate_reasoning(text, "qwen3")


PIECES = st.sampled_from(
    [*FORMATS.values(), UNKNOWN, BROKEN, DEEPSEEK, HARMONY, "<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", "[", '"', "\n",
     "\\ud800", "word", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<|channel|>final<|message|>", "\xe9", '{"name": 3}', "NaN"]
)  # fmt: skip


@needs_sglang
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_a_model_writes_no_parser_raises_or_changes_its_mind(sglang: Parsers, name: str):
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=30))
    def check(text: str) -> None:
        parsed = sglang.parse(name, text)
        assert parsed == sglang.parse(name, text)
        something = re.sub(r"<[^<>]*>", "", text).strip()
        assert parsed.content or parsed.reasoning or parsed.calls or not something

    check()


@needs_sglang
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["hermes", "qwen25"])
def test_every_word_is_in_the_message(sglang: Parsers, name: str):
    word = st.integers(0, 10**9).map(lambda n: f"w{n}")

    def piece(w: str) -> st.SearchStrategy[str]:
        return st.sampled_from(
            [
                w,
                f" {w}\n",
                call(f"{{{w}"),
                call(f'{{"name": "{w}"}}'),
                call(f'{{"name": "f", "arguments": {{"a": "{w}"}}}}'),
                f"<tool_call>{w}",
            ]
        )

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(word, max_size=6, unique=True).flatmap(lambda ws: st.tuples(st.just(ws), st.tuples(*map(piece, ws)))))
    def check(drawn: tuple[list[str], tuple[str, ...]]) -> None:
        parsed = sglang.parse(name, "".join(drawn[1]))
        message = parsed.content + parsed.reasoning + "".join(c.name + c.arguments for c in parsed.calls)
        assert all(w in message for w in drawn[0])

    check()


@needs_sglang
@pytest.mark.timeout(300)
def test_text_that_is_made_to_stall_a_parser_is_text_and_the_next_is_read(sglang: Parsers):
    bomb = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "<｜tool▁sep｜>" * 3000 + "\n```json\n" * 3000 + "<｜tool▁call▁end｜>"
    parsed = sglang.parse("deepseekv3", bomb)
    assert (parsed.content, parsed.failed) == (bomb, True)
    assert sglang.parse("deepseekv3", FORMATS["deepseekv3"]).calls == (MADE,)


@needs_sglang
@pytest.mark.timeout(300)
def test_a_process_that_was_killed_is_replaced_and_nothing_is_lost(sglang: Parsers):
    reader = sglang.reader("qwen25")
    assert reader._process is not None
    os.killpg(reader._process.pid, 9)
    assert sglang.parse("qwen25", GOOD).calls == (MADE,)


@needs_sglang
@pytest.mark.timeout(300)
def test_a_request_that_nobody_waits_for_any_more_leaves_its_answer_to_nobody_else(sglang: Parsers):
    async def leave_and_ask() -> Any:
        reader = sglang.reader("hermes")
        left = asyncio.ensure_future(reader.reasoning("<think>left</think>"))
        await asyncio.sleep(0)
        left.cancel()
        return await reader.reasoning("<think>asked</think>")

    sglang.reader("hermes")
    assert sglang.run(leave_and_ask()) == ("asked", "")


@needs_sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("start", [check_names, None])
def test_a_name_that_sglang_does_not_know_is_refused_with_those_that_it_does(sglang: Parsers, start: Callable[[ModelConfig], None] | None):
    model = ModelConfig(tool_parser="glm46")
    with pytest.raises(ConfigError, match="glm45" if start else "glm46"):
        start(model) if start else sglang.run(SGLangParsers("glm46", "none", dict(os.environ)).start())


@needs_sglang
def test_the_grammar_of_a_tool_choice_takes_calls_of_that_tool_and_nothing_else():
    accepts: Any = pytest.importorskip("xgrammar.testing")._is_grammar_accept_string
    grammar: Any = pytest.importorskip("xgrammar").Grammar.from_json_schema
    parameters = {"type": "object", "$defs": {"N": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/N"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}, {"type": "function", "function": {"name": "g"}}]
    texts = [
        '[{"name": "f", "parameters": {"a": 1}}]',
        '[{"name": "g", "parameters": {}}]',
        '[{"name": "f", "parameters": {"a": ""}}]',
        "[]",
    ]
    for choice, taken in (("required", texts[:2]), ({"function": {"name": "f"}}, texts[:1]), ({"function": {"name": "g"}}, texts[1:2])):
        made = grammar(tool_choice_schema(tools, choice))
        assert [text for text in texts if accepts(made, text)] == taken
