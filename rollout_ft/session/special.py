"""Special tokens that are written out in a message.

Owns the refusal of `session.special_tokens_in_text: refuse`. Pure. A tokenizer reads `<|im_end|>` in a text as the
token that ends a turn, so that whoever writes it can put words into anybody's mouth. Serving stacks let it pass, and
texts about models contain it, which is why refusing is a choice.
"""

from __future__ import annotations

import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.types import JSON


def refuse_special_tokens(messages: list[JSON], special_texts: tuple[str, ...]) -> None:
    """Raises BadRequest naming the message and the token, wherever in the message it stands."""
    for i, message in enumerate(messages):
        written = orjson.dumps(message)
        for text in special_texts:
            if orjson.dumps(text)[1:-1] in written:
                raise BadRequest(
                    f"message {i} of the new ones contains {text!r}, a special token of the model (session.special_tokens_in_text)",
                    code="special_token",
                    param="messages",
                )
