"""The vocabulary of a model directory, as bytes.

Owns what each token id stands for, and the way from ids to text. Must not know of models or HTTP. It reads
`tokenizer.json` as plain JSON (byte-level BPE only), so that an engine starts without a tokenizer library; only a
prompt that arrives as text imports one. The subtle invariant: text that was handed out is never taken back, so the
bytes of an unfinished character wait until the rest of it is there.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """Token bytes by id; an id without a token has none. `special` ids are left out of text, `markup` ids are not."""

    path: Path
    tokens: tuple[bytes, ...]
    ids: dict[str, int]
    special: frozenset[int]
    markup: frozenset[int]
    eos_id: int
    context_length: int

    @property
    def size(self) -> int:
        return len(self.tokens)

    @cached_property
    def printable(self) -> tuple[int, ...]:
        """Ordinary tokens of printable ASCII: a model that samples only these always makes valid text."""
        return tuple(
            token
            for token, content in enumerate(self.tokens)
            if content and token not in self.special | self.markup and all(0x20 <= byte < 0x7F for byte in content)
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class TextStream:
    """The text of a growing list of ids."""

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        self._tokens = vocabulary.tokens
        self._skipped: frozenset[int] = vocabulary.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""

    def feed(self, ids: Iterable[int], final: bool = False) -> None:
        tokens, skipped = self._tokens, self._skipped
        self.text += self._decoder.decode(b"".join([tokens[i] for i in ids if i not in skipped]), final)


def load_vocabulary(directory: Path) -> Vocabulary:
    """Read the tokenizer files of a model directory; ValueError names what is missing."""
    tokenizer: dict[str, Any] = orjson.loads((directory / "tokenizer.json").read_bytes())
    config: dict[str, Any] = orjson.loads((directory / "config.json").read_bytes())
    settings: dict[str, Any] = orjson.loads((directory / "tokenizer_config.json").read_bytes())
    if tokenizer["decoder"]["type"] != "ByteLevel":
        raise ValueError(f"{directory}: the small engine reads byte-level BPE tokenizers only")
    added: list[dict[str, Any]] = tokenizer["added_tokens"]
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"]) | {token["content"]: token["id"] for token in added}
    names = {token["id"]: token["content"] for token in added}
    tokens = [b""] * max(config.get("vocab_size", 0), max(ids.values()) + 1)
    byte_of = _byte_of_character()
    for name, token in ids.items():
        tokens[token] = names[token].encode() if token in names else bytes(byte_of[character] for character in name)
    eos: str | dict[str, Any] = settings["eos_token"]
    eos_name: str = eos if isinstance(eos, str) else eos["content"]
    if eos_name not in ids:
        raise ValueError(f"{directory}: eos_token {eos_name!r} of tokenizer_config.json is not in the vocabulary")
    return Vocabulary(
        path=directory,
        tokens=tuple(tokens),
        ids=ids,
        special=frozenset(token["id"] for token in added if token.get("special")),
        markup=frozenset(token["id"] for token in added if not token.get("special")),
        eos_id=ids[eos_name],
        context_length=int(config.get("max_position_embeddings", 32768)),
    )
