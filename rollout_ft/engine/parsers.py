"""Who reads tool calls and reasoning out of what a model wrote: SGLang's parsers, the engine's endpoints, or ours.

Owns the port `Parser`, the choice, and the rule that nothing is lost: whatever a parser drops (a call that does not
parse or to a tool that nobody declared, text between calls) is delivered as text. A parser that fails costs a turn its
tool calls and nothing else; only a connection to the engine that breaks is the engine's loss, as it is anywhere.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rollout_ft.config import Config, ModelConfig
from rollout_ft.engine.port import Engine
from rollout_ft.engine.sglang_parsers import SGLangParsers
from rollout_ft.errors import ConfigError, EngineLost, EngineRefused
from rollout_ft.session import hermes
from rollout_ft.session.calls import Call, calls_of
from rollout_ft.session.parse import Parsed

_log = logging.getLogger("rollout_ft")
OWN_TOOLS, OWN_REASONING = frozenset({"hermes", "qwen", "qwen25"}), frozenset({"qwen3"})
_MARKED_REASONING = frozenset({"gpt-oss", "gemma4", "apertus2509", "kimi_k3", "mistral", "inkling", "muse"})
"""Reasoning parsers that look for special tokens."""
_TAG = re.compile(r"<[^<>]*>")
_MAX_BLOCKS = 64
_INNER = {"<｜tool▁calls▁end｜>": "<｜tool▁call▁end｜>", "<｜tool_calls_end｜>": "<｜tool_call_end｜>"}
"""What closes each of several calls that stand between one pair of markers."""
Who = Literal["nobody", "own", "sglang", "engine"]
Found = tuple[str, list[Call]]


class Parser(Protocol):
    """Text in, message parts out. `closers`: stop tokens that it reads as well."""

    closers: frozenset[str]

    def keep_special(self, tools: list[Any] | None) -> bool: ...
    async def parse(self, text: str, tools: list[Any] | None, *, opened: str = "", forced: bool = False) -> Parsed:
        """`opened`: the tag with which the prompt began the reasoning; `forced`: the text is a JSON array of calls."""
        ...


class Reader(Protocol):
    """Somebody who can parse; None where they could not."""

    async def calls(self, texts: Sequence[str], tools: list[Any]) -> list[Found | None]: ...
    async def reasoning(self, text: str) -> tuple[str, str] | None: ...
    async def markers(self) -> tuple[str, str]: ...


class Own:
    async def calls(self, texts: Sequence[str], tools: list[Any]) -> list[Found | None]:
        return [hermes.tool_calls(text) for text in texts]

    async def reasoning(self, text: str) -> tuple[str, str] | None:
        return hermes.reasoning(text)

    async def markers(self) -> tuple[str, str]:
        return "", ""  # it drops nothing


class EngineParsers:
    """`POST /parse_function_call` and `/separate_reasoning` of the engine that sampled."""

    def __init__(self, engine: Engine, config: ModelConfig):
        self._engine, self._config = engine, config

    async def calls(self, texts: Sequence[str], tools: list[Any]) -> list[Found | None]:
        return [await self._calls(text, tools) for text in texts]

    async def _calls(self, text: str, tools: list[Any]) -> Found | None:
        try:
            content, calls = await self._engine.function_calls(text, tools, self._config.tool_parser)
        except EngineRefused:
            return None
        return content, [Call(name, arguments) for name, arguments in calls]

    async def reasoning(self, text: str) -> tuple[str, str] | None:
        try:
            return await self._engine.separate_reasoning(text, self._config.reasoning_parser)
        except EngineRefused:
            return None

    async def markers(self) -> tuple[str, str]:
        return "<tool_call>", "</tool_call>"  # of most formats; of the others, what no call was found in is text

    async def check(self, engine_id: str, tools: bool, reasoning: bool) -> None:
        """Raises EngineLost when the engine does not know the parsers that it will be asked for."""
        if tools and await self._calls("", []) is None:
            raise EngineLost(engine_id, f"it has no tool call parser {self._config.tool_parser} (model.tool_parser)")
        if reasoning and await self.reasoning("") is None:
            raise EngineLost(engine_id, f"it has no reasoning parser {self._config.reasoning_parser} (model.reasoning_parser)")


class TextParser:
    """Reasoning first, tool calls in the rest; each by whoever was chosen for it."""

    def __init__(self, config: ModelConfig, tools: Reader | None, reasoning: Reader | None):
        self._tools, self._reasoning, self._config = tools, reasoning, config
        self.closers = frozenset({"<|call|>"}) if config.tool_parser == "gpt-oss" else frozenset[str]()

    def keep_special(self, tools: list[Any] | None) -> bool:
        """As SGLang serves: special tokens are part of the text where a parser may look for them."""
        foreign = self._tools is not None and not isinstance(self._tools, Own)
        return (foreign and bool(tools)) or self._config.reasoning_parser in _MARKED_REASONING

    async def parse(self, text: str, tools: list[Any] | None, *, opened: str = "", forced: bool = False) -> Parsed:
        if forced:  # the grammar may have left out the reasoning, even where the prompt opened it
            calls = calls_of(text)
            if calls is not None:
                return Parsed("", calls=tuple(calls))
        thought, rest, failed = await self._think(text, opened)
        if not tools or (self._tools is None and not forced):
            return Parsed(rest, thought, (), failed)
        if forced:
            calls = calls_of(rest)
            return Parsed(rest, thought, (), True) if calls is None else Parsed("", thought, tuple(calls), failed)
        assert self._tools is not None
        content, found, unread = await read_calls(self._tools, rest, tools)
        return Parsed(content, thought, tuple(found), failed or unread)

    async def _think(self, text: str, opened: str) -> tuple[str, str, bool]:
        if self._reasoning is None or not text:
            return "", text, False
        found = await self._reasoning.reasoning(opened + text)
        if found is None or (not any(found) and _TAG.sub("", text).strip()):
            return "", text, True
        return *found, False


async def read_calls(reader: Reader, text: str, tools: list[Any]) -> tuple[str, list[Call], bool]:
    """`(content, calls, failed)`: what the reader found, and as content all that it did not make calls of."""
    found = _complete((await reader.calls([text], tools))[0])
    opening, closing = await reader.markers()
    head, *parts = text.split(opening) if opening else [text]
    if found is None or not (found[1] or len(parts) > 1):
        return text, [], found is None
    content, calls = found
    blocks = [opening + part for part in parts]
    tails = [_after(block, closing) for block in blocks]
    if not blocks or (len(blocks) == len(calls) and not any(tail.strip() for tail in tails)):
        return content, calls, False
    if len(blocks) > _MAX_BLOCKS:
        return text, [], True
    alone = [_complete(each) for each in await reader.calls(blocks, tools)]
    made = [call for each in alone if each for call in each[1]]
    if calls and made != calls:
        return content, calls, False  # a format whose calls do not stand in blocks of their own
    kept = [tail if each and each[1] else block for block, tail, each in zip(blocks, tails, alone, strict=True)]
    return ("".join([head, *kept]).strip() if made else text), made, False


def _after(block: str, closing: str) -> str:
    """What follows the calls of a block."""
    if closing and closing in block:
        return block.partition(closing)[2]
    inner = _INNER.get(closing)
    return block.rpartition(inner)[2] if inner and inner in block else ""


def _complete(found: Found | None) -> Found | None:
    """A call without a name is nobody's call: then nothing was found."""
    return found if found is None or all(call.name for call in found[1]) else (found[0], [])


def choose(name: str, own: frozenset[str], *, engine: str, installed: bool) -> Who:
    """Who reads the format `name`; the small engine's own parsers are ours, so that nobody has to be asked for them."""
    if name == "none":
        return "nobody"
    if name in own and engine == "small":
        return "own"
    return "sglang" if installed else "engine"


def chosen(config: Config) -> tuple[Who, Who]:
    """Who reads tool calls, and who reasoning."""
    model, installed = config.model, sglang_dir() is not None
    return (
        choose(model.tool_parser, OWN_TOOLS, engine=config.engine.kind, installed=installed),
        choose(model.reasoning_parser, OWN_REASONING, engine=config.engine.kind, installed=installed),
    )


async def start_sglang(config: Config, env: dict[str, str]) -> SGLangParsers | None:
    """SGLang's parsers, ready, where they are the ones to ask. Takes seconds; raises ConfigError when they refuse."""
    tools, reasoning = chosen(config)
    if "sglang" not in (tools, reasoning):
        return None
    names = (config.model.tool_parser if tools == "sglang" else "none", config.model.reasoning_parser if reasoning == "sglang" else "none")
    parsers = SGLangParsers(*names, env)
    await parsers.start()
    return parsers


async def make_parser(config: Config, engine_id: str, engine: Engine, sglang: SGLangParsers | None) -> TextParser:
    """The parser for this config. Raises EngineLost when the engine has to parse and does not know how."""
    model, (tools, reasoning) = config.model, chosen(config)
    asked = EngineParsers(engine, model)
    await asked.check(engine_id, tools == "engine", reasoning == "engine")
    readers: dict[Who, Reader] = {"own": Own(), "engine": asked}
    if sglang is not None:
        readers["sglang"] = sglang
    _log.info("tool calls (%s) are read by %s, reasoning (%s) by %s", model.tool_parser, tools, model.reasoning_parser, reasoning)
    return TextParser(model, readers.get(tools), readers.get(reasoning))


def sglang_dir() -> Path | None:
    """Where sglang is installed, found without importing it; a folder of that name that is no package is not it."""
    spec = importlib.util.find_spec("sglang")
    return Path(spec.origin).parent if spec and spec.origin else None


def check_names(model: ModelConfig) -> None:
    """Refuses a parser that SGLang does not know, where it is installed. Raises ConfigError naming those that it does."""
    directory = sglang_dir()
    if directory is None:
        return
    for key, name, own, listed in (
        ("tool_parser", model.tool_parser, OWN_TOOLS, "srt/function_call/parser_names.py"),
        ("reasoning_parser", model.reasoning_parser, OWN_REASONING, "srt/parser/reasoning_parser_names.py"),
    ):
        known = _names(directory / listed)
        if known and name not in {"none", *own, *known}:
            raise ConfigError(f"model.{key}: SGLang has no parser {name!r}; known: none, {', '.join(sorted({*own, *known}))}")


def _names(path: Path) -> list[str]:
    """The names in a module of SGLang that holds nothing else; none where a version has no such module."""
    spec = importlib.util.spec_from_file_location("sglang_parser_names", path) if path.exists() else None
    if spec is None or spec.loader is None:
        return []
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [str(name) for names in vars(module).values() if isinstance(names, list) for name in names]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
