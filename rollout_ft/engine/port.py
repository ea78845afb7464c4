"""What an engine is to everybody else: ids in, chunks of ids and logprobs out.

Owns the port that the adapters implement. Knows nothing of HTTP or of a model server's names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_ft.types import JSON, Spelled, VersionSpan


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of a generation. `finish` is `stop`, `length` or `abort` in the last one, else empty.

    `spans` cover all tokens of the generation so far, with offsets from its own first token. `routed` comes with the last
    one, where it was asked for: base64 of int32, as the engine sent it and unchecked. `recaptured` says that the engine
    computed tokens of this generation twice, so that some of it is not from when they were sampled. `cached`: tokens of the
    prompt that it did not compute. `version` is that of the weights that the engine had when it aborted.
    """

    ids: list[int]
    logprobs: list[float]
    spans: tuple[VersionSpan, ...]
    finish: str = ""
    routed: bytes | memoryview = b""
    recaptured: bool = False
    cached: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    weight_version: str
    model_path: str


class Engine(Protocol):
    def generate(
        self, rid: str, input_json: Spelled, sampling: JSON, routed_from: int | None = None, rank: int | None = None
    ) -> AsyncIterator[Chunk]:
        """Streams one generation. `input_json`: all input ids as JSON without brackets; `routed_from`: the first row of
        routed experts that is wanted, if any is; `rank`: the data-parallel rank that has it, where there are several.

        Raises EngineRefused when the engine answered no, EngineLost when the connection to it broke.
        """
        ...

    async def function_calls(self, text: str, tools: list[Any], parser: str) -> tuple[str, list[tuple[str, str]]]:
        """`(text, [(name, arguments)])` of a tool parser. Raises EngineRefused when it fails, EngineLost as above."""
        ...

    async def separate_reasoning(self, text: str, parser: str) -> tuple[str, str]:
        """`(reasoning, text)` of a reasoning parser. Raises as `function_calls`."""
        ...

    async def abort(self, rid: str) -> None: ...
    async def load(self) -> int | None:
        """How many requests it has, those that wait among them; None when it does not say."""
        ...

    async def alive(self) -> bool:
        """Whether it answers at all: paused is alive."""
        ...

    async def scheduler_answers(self) -> None:
        """Returns when what computes has answered, also while it is paused. Raises EngineLost, EngineRefused."""
        ...

    async def ready(self) -> bool:
        """Whether it would serve: not while it starts or is paused."""
        ...

    async def info(self) -> EngineInfo: ...
    async def aclose(self) -> None: ...
