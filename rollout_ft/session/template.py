"""A model's chat template and tokenizer, from its directory.

Owns the files (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json`) and the
environment that templates expect: the names that Hugging Face gives them, in jinja2's sandbox. transformers renders
the same and takes three seconds of CPU to import, which every restart of an engine's actor would pay; it is asked only
where a directory has no `tokenizer.json`.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rollout_ft.errors import ConfigError
from rollout_ft.types import JSON


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled chat template with the tokenizer that it is written for; `special` are names like `eos_token`."""

    tokenizer: Any
    compiled: Any
    special: JSON
    eos_ids: frozenset[int]

    def render(self, messages: list[JSON], tools: list[Any] | None = None, kwargs: JSON | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation, `prompt`: up to where the assistant speaks. Raises whatever the template raises."""
        values: JSON = {**self.special, **(kwargs or {})}
        return cast(str, self.compiled.render(messages=messages, tools=tools, add_generation_prompt=prompt, **values))

    def encode(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: list[int], special: bool = False) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=not special))


class _Generation(Extension):
    """`{% generation %}` marks what is trained; for rendering it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, whose checks are most of the cost of a short rendering: it asks for every `message.role` anew what
    depends on the type and the name alone."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._safe: dict[tuple[type[Any], str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = (cast(Any, type(obj)), attr)
        if key not in self._safe:
            self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return self._safe[key]

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT:  # a key, which the sandbox would find by way of an AttributeError
            keys = cast(JSON, obj)
            return keys[attribute] if attribute in keys else self.undefined(obj=keys, name=attribute)
        return super().getattr(obj, attribute)


_DICT = frozenset(dir(dict))


def compile_template(source: str) -> Any:
    """A template with the filters and functions that Hugging Face's templates use."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)  # type: ignore[arg-type]
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def load(model_dir: str, chat_template: str = "") -> Template:
    """The template of a model; the file `chat_template`, if any, stands in for the model's own.

    Raises ConfigError naming what the directory lacks.
    """
    directory = Path(model_dir)
    other = _read(Path(chat_template), "model.chat_template") if chat_template else None
    if not (directory / "tokenizer.json").exists():
        return _load_with_transformers(directory, other)
    config: JSON = _read_json(directory / "tokenizer_config.json")
    source = other or _template_source(directory, config)
    special = {k: _token_text(v) for k, v in config.items() if k.endswith("_token") and v is not None}
    tokenizers: Any = importlib.import_module("tokenizers")
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        return Template(tokenizer, compile_template(source), special, _eos_ids(directory, tokenizer, special))
    except Exception as e:  # tokenizers raises bare Exception for a file that it cannot read
        raise ConfigError(f"model.path: {directory}: {e}") from None


def _eos_ids(directory: Path, tokenizer: Any, special: JSON) -> frozenset[int]:
    """Where the engine stops: the tokenizer's `eos_token` and what `generation_config.json` adds."""
    path = directory / "generation_config.json"
    listed: Any = _read_json(path).get("eos_token_id") if path.exists() else None
    ids = {int(i) for i in (cast("list[Any]", listed) if isinstance(listed, list) else [listed]) if i is not None}
    eos: Any = tokenizer.token_to_id(str(special.get("eos_token")))
    return frozenset(ids if eos is None else ids | {int(eos)})


def _template_source(directory: Path, config: JSON) -> str:
    apart = directory / "chat_template.jinja"
    source: Any = apart.read_text() if apart.exists() else config.get("chat_template")
    if isinstance(source, list):
        named = {str(t["name"]): t["template"] for t in cast("list[JSON]", source)}
        source = named.get("default")
    if not isinstance(source, str):
        raise ConfigError(f"model.path: {directory} has no chat template (chat_template.jinja, or in tokenizer_config.json)")
    return source


def _token_text(value: Any) -> Any:
    return cast(JSON, value).get("content") if isinstance(value, dict) else value


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as e:
        raise ConfigError(f"{key}: {path}: {e}") from None


def _read_json(path: Path) -> JSON:
    try:
        return json.loads(_read(path, "model.path"))
    except ValueError as e:
        raise ConfigError(f"model.path: {path}: {e}") from None


def _load_with_transformers(directory: Path, other: str | None) -> Template:
    try:
        transformers: Any = importlib.import_module("transformers")
        loaded: Any = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (ImportError, OSError, ValueError) as e:
        raise ConfigError(f"model.path: {directory} has no tokenizer.json, and transformers cannot load it: {e}") from None
    source = other or loaded.chat_template
    if not source:
        raise ConfigError(f"model.path: the tokenizer in {directory} has no chat template")
    special, tokenizer = dict(loaded.special_tokens_map), loaded.backend_tokenizer
    return Template(tokenizer, compile_template(source), special, _eos_ids(directory, tokenizer, special))
