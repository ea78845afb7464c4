"""What is asked of the load generator, and what it answers: lines of JSON between two processes.

Owns the shapes. Must not know of HTTP or of figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rollout_ft.errors import RolloutFTError

LINE_BYTES = 2**24
Kind = Literal["through", "direct", "compare", "collect"]


class LoadFailed(RolloutFTError):
    """A request of the load was not answered as it should be: what was measured means nothing."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Where one session is to be had."""

    base_url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Load:
    """Who takes turns. `through`: every chat at once. `direct`: as many conversations as there are chats, straight to
    the engines. `compare`: one chat after the other, each turn followed by one of as many tokens straight to an engine.
    `collect`: a turn is a read of the chat's trajectory. `pause_s` lies between an answer and the next request.
    """

    kind: Kind
    chats: list[Chat]
    engines: list[str]
    tokenizer: str
    tokens_in: int
    tokens_out: int
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """So many more turns of everyone, or turns for so long. Conversations go on from one step to the next."""

    turns: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """One step. Latencies in order of completion; `direct_ms` only of `compare`. `prompt_tokens`: of all turns.
    `reading_ms`: CPU of `orjson.loads` of a body, the mean of one conversation's; `bytes_out`: of the last body."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    prompt_tokens: int = 0
    latencies_ms: list[float] = field(default_factory=list[float])
    direct_ms: list[float] = field(default_factory=list[float])
    reading_ms: float = 0.0
    bytes_out: int = 0
    bytes_in: int = 0
    error: str = ""

    @property
    def turns(self) -> int:
        return len(self.latencies_ms)
