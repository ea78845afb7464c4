"""A model's chat template and tokenizer, from its directory.

Owns the files (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`) and the environment that templates
expect: the names that Hugging Face gives them, in jinja2's sandbox. transformers renders the same and takes three
seconds of CPU to import, which every restart of an engine's actor would pay; it is asked only where a directory has
no `tokenizer.json`.
"""

from __future__ import annotations

import importlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rollout_ft.errors import ConfigError
from rollout_ft.types import JSON


class _Generation(Extension):
    """`{% generation %}` marks what is trained; for rendering it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> Any:
    """A template with the filters and functions that Hugging Face's templates use."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)  # type: ignore[arg-type]
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def load(model_dir: str) -> tuple[Any, Any, JSON]:
    """`(tokenizer, template, special_tokens)`: a `tokenizers.Tokenizer`, a compiled template, names like `eos_token`.

    Raises ConfigError naming what the directory lacks.
    """
    directory = Path(model_dir)
    if not (directory / "tokenizer.json").exists():
        return _load_with_transformers(model_dir)
    config: JSON = _read_json(directory / "tokenizer_config.json")
    source = _template_source(directory, config)
    special = {k: _token_text(v) for k, v in config.items() if k.endswith("_token") and v is not None}
    tokenizers: Any = importlib.import_module("tokenizers")
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        return tokenizer, compile_template(source), special
    except Exception as e:  # tokenizers raises bare Exception for a file that it cannot read
        raise ConfigError(f"model.path: {directory}: {e}") from None


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


def _read_json(path: Path) -> JSON:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.path: {path}: {e}") from None


def _load_with_transformers(model_dir: str) -> tuple[Any, Any, JSON]:
    try:
        transformers: Any = importlib.import_module("transformers")
        loaded: Any = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (ImportError, OSError, ValueError) as e:
        raise ConfigError(f"model.path: {model_dir} has no tokenizer.json, and transformers cannot load it: {e}") from None
    if not loaded.chat_template:
        raise ConfigError(f"model.path: the tokenizer in {model_dir} has no chat template")
    return loaded.backend_tokenizer, compile_template(loaded.chat_template), dict(loaded.special_tokens_map)
