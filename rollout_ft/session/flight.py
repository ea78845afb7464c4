"""A turn that is being generated.

Owns what its generation needs to know and who waits for it. Knows nothing of engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node, digest_tokens
from rollout_ft.types import Partial, Spelled


@dataclass(slots=True, eq=False)
class Flight:
    """`input_json` are all ids before the output, as JSON without brackets. `callers` are the ids of the requests that
    wait for it now, `joined` of all that ever did, with their Idempotency-Keys; `order` is the number of the first."""

    key: str
    base: str
    number: int
    order: int
    parent: Node | None
    request: TurnRequest
    new_from: int
    trim: int
    prompt_ids: bytes
    input_json: Spelled
    prompt_tokens: int
    max_new_tokens: int
    seed: int
    partial: Partial | None = None
    callers: set[str] = field(default_factory=set[str])
    joined: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def prompt_digest(self) -> str:
        return digest_tokens(self.parent.token_digest if self.parent else b"", self.prompt_ids, self.trim).hex()
