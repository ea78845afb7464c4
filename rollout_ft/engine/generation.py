"""One turn's output, over as many engine calls as it takes on this engine.

Owns the tokens sampled so far and the deadlines for the next. Knows nothing of sessions, commits or other engines:
when the engine is lost it says so, and what it has stays readable. Every engine call has a `rid` of its own.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from rollout_ft.clock import monotonic
from rollout_ft.engine.capture import Capture
from rollout_ft.engine.continuation import cut_spans, join_spans, start_from
from rollout_ft.engine.patience import Patience, Wait
from rollout_ft.engine.port import Chunk, Engine
from rollout_ft.errors import EngineAborted, EngineLost, EngineRefused
from rollout_ft.session.freshness import versions_of
from rollout_ft.session.tree import ids_bytes, ids_of
from rollout_ft.types import JSON, Partial, Spelled, VersionSpan


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be generated: `input_json` are the prompt's ids as JSON without brackets."""

    turn_key: str
    request_id: str
    prompt_digest: str
    input_json: Spelled
    sampling: JSON
    max_new_tokens: int
    seed: int
    stop_ids: frozenset[int]
    vocab_size: int
    prompt_tokens: int = 0
    one_version: bool = False
    """All its tokens are to be of one version of the weights."""


class VersionsMixed(Exception):
    """The weights were updated under a turn whose tokens are to be of one version: it begins anew."""


@dataclass(slots=True)
class Generation:
    order: Order
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    spans: tuple[VersionSpan, ...] = ()
    rid: str = ""
    calls: int = 0
    wasted: int = 0
    reused: int = 0
    regenerated: bool = False
    calling: bool = False
    began: float = field(default_factory=monotonic)
    finish: str = ""
    rank: int | None = None
    """The data-parallel rank that it goes to, where there are several."""
    asked: str = ""
    """The call that we asked the engine to abort."""
    wait: Wait | None = None
    """What the last call waited for, and since when."""
    capture: Capture | None = None
    """Of routed experts, where they are asked for; what another engine had captured is lost with it."""

    def adopt(self, partial: Partial) -> None:
        """Goes on from what another engine had sampled."""
        self.ids = ids_of(partial.output_ids)
        self.logprobs = np.frombuffer(partial.logprobs, dtype="<f4").tolist()
        self.spans = partial.version_spans
        self.calls, self.wasted, self.reused = partial.generations, partial.tokens_wasted, len(self.ids)

    def partial(self) -> Partial:
        o = self.order
        return Partial(
            o.turn_key, self.rid, o.request_id, o.prompt_digest, ids_bytes(self.ids), logprob_bytes(self.logprobs),
            self.spans, self.calls, self.wasted,
        )  # fmt: skip

    def complete(self) -> bool:
        """Whether nothing remains to be generated; drops what the next call cannot continue."""
        if self.finish:
            return True
        o = self.order
        start = start_from(self.ids, sampling=o.sampling, stop_ids=o.stop_ids, max_new_tokens=o.max_new_tokens)
        dropped = len(self.ids) - start.keep
        if dropped:
            self.ids, self.logprobs = self.ids[: start.keep], self.logprobs[: start.keep]
            self.spans = tuple(cut_spans(self.spans, start.keep))
            if self.capture is not None:
                self.capture.cut(start.keep)
            self.wasted += dropped
            self.reused = min(self.reused, start.keep)
            self.regenerated = True
        self.finish = start.finish
        return bool(self.finish)

    def excuse(self) -> None:
        """The last call ended for what is no failure of anybody, and counts as none."""
        self.calls -= 1
        self.reused = len(self.ids)

    def begin_anew(self) -> None:
        """Nothing that was sampled so far is kept."""
        self.wasted += len(self.ids)
        self.ids, self.logprobs, self.spans, self.reused, self.regenerated = [], [], (), 0, True
        if self.capture is not None:
            self.capture.cut(0)

    async def call(self, engine: Engine, patience: Patience, progress: Progress, answered: Callable[[], None]) -> None:
        """One call, to its finish; `progress` is told of every chunk and may add sampling parameters, `answered` of the first.

        Raises EngineLost, or EngineRefused: with status None when the generation was aborted at the engine. VersionsMixed.
        """
        o, kept, before = self.order, len(self.ids), self.spans
        self.rid = uuid.uuid4().hex
        self.calls += 1
        self.calling = True
        sampling = {**o.sampling, "max_new_tokens": o.max_new_tokens - kept, "sampling_seed": o.seed, **(await progress(self) or {})}
        if sampling.get("min_new_tokens"):
            sampling["min_new_tokens"] = max(0, sampling["min_new_tokens"] - kept)
        input_json = b",".join((o.input_json, *(b"%d" % i for i in self.ids))) if kept else o.input_json
        rank = () if self.rank is None else (self.rank,)
        stream = engine.generate(self.rid, input_json, sampling, self.capture.end if self.capture else None, *rank)
        try:
            async with patience.waits(o.prompt_tokens + kept) as wait:
                self.wait = wait
                async for chunk in stream:
                    if wait.owed:
                        answered()
                    self._take(chunk, before, kept)
                    wait.moved(len(chunk.ids), chunk.cached)
                    if o.one_version and len(versions_of(self.spans)) > 1:
                        raise VersionsMixed
                    if chunk.finish == "abort":
                        raise EngineAborted(chunk.version)
                    if chunk.finish:
                        self.finish = chunk.finish
                        return
                    await progress(self)
            raise EngineLost("", "connection: the stream ended without a finish reason")
        finally:
            self.calling = False
            await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

    def _take(self, chunk: Chunk, before: tuple[VersionSpan, ...], kept: int) -> None:
        """Checked before anything is built on it: an engine that returns nonsense is an engine fault."""
        if chunk.ids and not 0 <= min(chunk.ids) <= max(chunk.ids) < self.order.vocab_size:
            raise EngineRefused(502, "the engine returned an id outside the vocabulary")
        if len(chunk.ids) != len(chunk.logprobs) or not _numbers(chunk.logprobs):
            raise EngineRefused(502, "the engine returned a token without a logprob, or one that is not a number")
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        self.spans = join_spans(before, chunk.spans, kept, len(self.ids))
        if chunk.finish and self.capture is not None:
            self.capture.take(kept, len(self.ids), chunk.routed, recaptured=chunk.recaptured)


def _numbers(values: list[float]) -> bool:
    """One that is missing, infinite or no number shows in the sum."""
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def logprob_bytes(values: list[float]) -> bytes:
    return np.asarray(values, dtype="<f4").tobytes()


Progress = Callable[[Generation], Awaitable[JSON | None]]
"""Told of every chunk, and before the first; may add sampling parameters then."""
