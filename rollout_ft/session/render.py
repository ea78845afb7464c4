"""Messages to token ids, only for what is new.

Owns the chat template and the tokenizer. Knows nothing of turns. What follows an assistant's turn is rendered behind a
stand-in assistant message and cut at its end, so that the cost is that of the new messages and the sampled tokens are
never decoded and encoded again. Holds for templates that only append; what closes an assistant turn is the template's
text between that message and the next, of which the model may have sampled the first token itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import orjson

from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.session.canonical import text_of
from rollout_ft.session.template import load
from rollout_ft.types import JSON

STAND_IN = "\N{BLACK SQUARE}stand-in\N{BLACK SQUARE}"
_BASE: list[JSON] = [{"role": "user", "content": "-"}, {"role": "assistant", "content": STAND_IN}]


@dataclass(frozen=True, slots=True)
class Suffix:
    """What follows an assistant's turn: its last `trim` tokens are dropped, then come `ids`."""

    trim: int
    ids: list[int]


class Renderer(Protocol):
    """Turns messages into ids and ids into text; `stop_ids` end an assistant's turn, `vocab_size` bounds all ids.

    `special_texts`: what in a text becomes a special token.
    """

    special_texts: tuple[str, ...]
    stop_ids: frozenset[int]
    vocab_size: int

    def root(self, messages: list[JSON], tools: list[Any] | None) -> list[int]: ...
    def after(self, last_id: int, messages: list[JSON], tools: list[Any] | None) -> list[int]: ...
    def text(self, ids: list[int]) -> str: ...


class ChatTemplate:
    """A model's own tokenizer and chat template, loaded from its directory."""

    def __init__(self, model_dir: str):
        self._tokenizer, self._template, self._special = load(model_dir)
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        added: Any = self._tokenizer.get_added_tokens_decoder().values()
        self.special_texts = tuple(str(token.content) for token in added if token.special)
        stop = self._tokenizer.token_to_id(str(self._special.get("eos_token")))
        if stop is None:
            raise ConfigError(f"model.path: the tokenizer in {model_dir} names no eos_token that it knows")
        self.stop_ids = frozenset({int(stop)})

    def root(self, messages: list[JSON], tools: list[Any] | None) -> list[int]:
        """All ids of a conversation that starts here, up to where the assistant speaks."""
        return self._encode(self._render(messages, tools))

    def after(self, last_id: int, messages: list[JSON], tools: list[Any] | None) -> list[int]:
        """The ids between an assistant's turn whose last token is `last_id` and the assistant's next."""
        text = self._render([*_BASE, *messages], None)
        ids = self._encode(text[text.index(STAND_IN) + len(STAND_IN) :])
        return ids[1:] if ids and ids[0] == last_id and last_id in self.stop_ids else ids

    def text(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=True))

    def _render(self, messages: list[JSON], tools: list[Any] | None) -> str:
        try:
            return cast(
                str,
                self._template.render(
                    messages=[_for_template(m) for m in messages], tools=tools, add_generation_prompt=True, **self._special
                ),
            )
        except Exception as e:
            raise BadRequest(f"the model's chat template cannot render these messages: {e}", param="messages") from e

    def _encode(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _for_template(message: JSON) -> JSON:
    """As templates expect it: content is text, arguments of tool calls are objects where they are JSON."""
    plain: JSON = {**message, "content": text_of(message.get("content"), "message")}
    if plain.get("tool_calls"):
        calls: Any = plain["tool_calls"]
        plain["tool_calls"] = [_call_for_template(call) for call in calls]
    return plain


def _call_for_template(call: JSON) -> JSON:
    value = call["function"].get("arguments")
    try:
        parsed: Any = orjson.loads(value) if isinstance(value, str) and value else (value or {})
    except orjson.JSONDecodeError:
        parsed = value
    return {**call, "function": {**call["function"], "arguments": parsed}}
