"""A renderer without a tokenizer: every byte is a token, messages stand between markers.

Owns the smallest template that only appends. For tests and simulations that must not load a model.
"""

from __future__ import annotations

from typing import Any

from rollout_ft.session.canonical import text_of
from rollout_ft.session.render import Suffix, splice
from rollout_ft.types import JSON

START, STOP = 256, 257
VOCAB_SIZE = 258


class PlainTemplate:
    special_texts: tuple[str, ...] = ()
    stop_ids = frozenset({STOP})
    vocab_size = VOCAB_SIZE
    splices = True

    def root(self, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> list[int]:
        return self._render(messages)

    def append(self, reply: JSON, last_id: int, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> Suffix:
        return splice(last_id, [STOP, *self._render(messages)], self.stop_ids)

    def text(self, ids: list[int], *, keep_special: bool = False) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def _render(self, messages: list[JSON]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            head = f"{message['role']}\n".encode()
            ids += [START, *head, *text_of(message.get("content"), "message").encode(), STOP]
        return [*ids, START, *b"assistant\n"]
