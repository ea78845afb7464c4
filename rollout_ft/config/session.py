"""Sessions: what a repeated request gets, how long a conversation may be, and what new weights mean to it.

Owns the keys `session.…`. Knows no trial and no engine. Every number here is a limit; of them only
`max_staleness` can be absent.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rollout_ft.config.base import Seconds, Settings


class SessionConfig(Settings):
    grace_s: Seconds = 60
    """How long a generation without a caller goes on, its retry being expected."""
    on_concurrent: Literal["sample", "attach"] = "sample"
    on_repeat: Literal["sibling", "replay_once"] = "sibling"
    max_replays: int = Field(default=2, ge=0)
    """How often a retry gets a reply that its client has in all likelihood; then it gets another sample."""
    max_vain_replays: int = Field(default=32, ge=1)
    """How often a reply that was never delivered whole is sent again; then a repeat gets another sample. Harnesses repeat
    up to 30 times when a network loses replies."""
    matcher: str = "canonical"
    """When two messages are the same: `canonical`, `strict`, or `module:function` from a message to bytes."""
    normalizers: list[str] = []
    """What may differ in the texts of tools and users when a trial is replayed: `timestamps`, `durations`, `uuids`, `temp_paths`,
    `hex_ids`, or `module:function` from a text to a text. Both texts are compared with what these find made equal; the recorded
    one is what stays. Only where a replay would leave its record otherwise, and only of requests that add 64 Ki characters
    at most."""
    max_turns: int = Field(default=10_000, ge=1)
    max_messages: int = Field(default=20_000, ge=1)
    max_tools: int = Field(default=512, ge=1)
    max_tokens: int = Field(default=2**26, ge=1)
    """Of all turns of a session together, each counted with what it adds to its path."""
    max_in_flight: int = Field(default=32, ge=1)
    max_steps: int = Field(default=20_000, ge=1)
    """Recorded steps of a trial's environment."""
    max_output_tokens: int = Field(default=8192, ge=1)
    """Used when neither the agent nor the session names a limit."""
    version_policy: Literal["mixed", "turn", "trial"] = "mixed"
    """What an update of the weights means to what was sampled before it. `mixed`: it stays, and spans tell which token is of
    which version; `turn`: all tokens of a turn are of one version, and one that is being generated begins anew; `trial`: all
    tokens of a trial are, and one that has any of another version starts from scratch."""
    max_staleness: int | None = Field(default=None, ge=0)
    """How many updates the oldest token of a trial may be behind the trainer; none: any number."""
    on_stale: Literal["refuse", "restart"] = "refuse"
    """What becomes of a trial that is older: its next request gets a final error, or it starts from scratch."""
    special_tokens_in_text: Literal["keep", "refuse"] = "keep"
    """A message that contains the text of a special token (`<|im_end|>`): `keep` encodes it as that token, as serving
    stacks do, so that an agent can write turns that nobody took; `refuse` is a 400."""
