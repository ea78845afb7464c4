"""One model request as the session sees it, whatever dialect it came in.

Owns what identifies a request and what counts as evidence of a retry. Knows nothing of HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rollout_ft.types import JSON

TEMPLATE_KWARGS = "chat_template_kwargs"


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """`digests[i]` is the digest before message i; `sampling` is what the engine is asked for, without the seed, and
    the chat template's arguments, because they too make it another turn."""

    request_id: str
    messages: list[JSON]
    digests: list[bytes]
    tools: bytes
    tool_list: list[Any] | None
    sampling: JSON
    retry: bool = False
    """The client says so: `x-stainless-retry-count` above 0."""
    idempotency_key: str = ""
    input_ids: bytes | None = None
    """For a request in tokens: the whole prompt, int32; it has no messages, digests or tools then."""
    forced_call: bool = False
    """`tool_choice` asks for a call: `sampling` has its `json_schema`, and the output is a JSON array of calls."""
    resent: bool = False
    """A gateway sends it again, because the owner that it went to was lost."""

    @property
    def template_kwargs(self) -> JSON:
        """More arguments for the chat template."""
        return self.sampling.get(TEMPLATE_KWARGS) or {}

    @property
    def engine_sampling(self) -> JSON:
        """The part of `sampling` that an engine understands."""
        return {k: v for k, v in self.sampling.items() if k != TEMPLATE_KWARGS}
