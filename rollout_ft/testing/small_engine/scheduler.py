"""Which request computes next.

Owns the queues, the pause, the weights' version and the order of work of one engine. Must not know of HTTP. All of it
runs in one event loop, without locks: the run loop computes for at most a slice of time and then lets the network
have its turn, which is what keeps `/health` at milliseconds while the model is busy.

Prompts are computed one after another, so that the second of two with a common beginning finds it in the cache;
requests that sample take turns between them. The subtle invariant: tokens are counted before they are recorded, and
recorded before anybody is told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rollout_ft.clock import Clock
from rollout_ft.testing.small_engine.counter import Counter
from rollout_ft.testing.small_engine.model import Model
from rollout_ft.testing.small_engine.pacing import Pace
from rollout_ft.testing.small_engine.protocol import JSON, Request, ValueRefused
from rollout_ft.testing.small_engine.routed import Experts
from rollout_ft.testing.small_engine.running import ABORTED, Running
from rollout_ft.testing.small_engine.vocabulary import Vocabulary

_SLICE_S = 0.002
_PREFILL_POSITIONS = 8

PauseMode = Literal["abort", "in_place", "retract"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on; `max_queued` None is no limit, `tokens_per_s` 0 is as fast as it goes. Without `experts` no
    routed experts are returned, as by SGLang without --enable-return-routed-experts."""

    tokens_per_s: float = 80.0
    stream_interval: int = 4
    context_length: int = 32768
    max_running: int = 1024
    max_queued: int | None = None
    experts: Experts | None = None


class Scheduler:
    """The requests of one engine."""

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        limits: Limits,
        version: str,
        counter: Counter,
        clock: Clock,
    ) -> None:
        self.vocabulary = vocabulary
        self.limits = limits
        self.version = version
        self.paused: PauseMode | None = None
        self._paused_at = 0.0
        self._model = model
        self._counter = counter
        self._clock = clock
        self._requests: dict[str, Running] = {}
        self._running: set[Running] = set()
        self._waiting: deque[Running] = deque()
        self._prefills: deque[Running] = deque()
        self._ready: deque[Running] = deque()
        self._updates = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._beats: list[asyncio.Future[None]] = []
        model.load(version)

    # What the server asks for.

    def submit(self, request: Request) -> Running:
        """Take on a request; its `changed` event tells of progress."""
        if request.rid in self._requests:
            raise ValueRefused(f"Duplicate request ID detected: {request.rid}")
        max_queued = self.limits.max_queued
        # While paused SGLang holds requests in front of its queue, where it does not count them.
        if max_queued is not None and not self.paused and self.in_flight >= self.limits.max_running + max_queued:
            raise ValueRefused("The request queue is full.", status=503)
        running = Running(request, self.vocabulary, self._clock())
        self._requests[request.rid] = running
        self._waiting.append(running)
        self._wake.set()
        return running

    def abort(self, rid: str) -> None:
        if rid in self._requests:
            self._finish(self._requests[rid], ABORTED)

    def abort_all(self) -> None:
        for running in list(self._requests.values()):
            self._finish(running, ABORTED)

    def pause(self, mode: PauseMode) -> None:
        """No request begins from now on, and those that run are aborted, frozen, or sent back to wait."""
        if self.paused is None:
            self._paused_at = self._clock()
        self.paused = mode
        if mode == "abort":
            self.abort_all()
        elif mode == "retract":
            for running in sorted(self._running, key=lambda running: running.arrived, reverse=True):
                self._retract(running)
            self._prefills.clear()
            self._ready.clear()
        self._settled.set()

    def resume(self) -> None:
        if self.paused is None:
            return
        self.paused = None
        now = self._clock()
        for running in self._running | set(self._waiting):
            if running.pace is not None:
                running.pace.shift(now - self._paused_at)
                running.due += now - self._paused_at
            if running.timer is not None:
                self._arm(running, now)
        self._wake.set()

    def set_version(self, version: str) -> None:
        """Take the weights that `version` names at once, in the middle of whatever runs."""
        self._model.load(version)
        self.version = version

    async def update_weights(self, version: str, seed: str, flush_cache: bool) -> None:
        """Take new weights: at once when paused, else when what runs has ended; new requests wait meanwhile."""
        if self.paused and flush_cache and self._running:
            raise ValueRefused("Cache flush failed: requests are in flight. Pass flush_cache false, or retract them.")
        self._updates += 1
        try:
            while not self.paused and self._running:
                self._settled.clear()
                await self._settled.wait()
            self._model.load(seed)
            self.version = version
        finally:
            self._updates -= 1
            self._wake.set()

    def flush_cache(self) -> bool:
        if self._running:
            return False
        self._model.forget()
        return True

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing waits unless it is paused: then it waits without memory."""
        return not self._running and (self.paused in ("in_place", "retract") or not self._requests)

    async def heartbeat(self) -> None:
        """Return when the run loop has come by; while it is frozen by a pause it does not."""
        beat: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._beats.append(beat)
        self._wake.set()
        await beat

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def load(self) -> JSON:
        used = sum(len(running.request.prompt) + len(running.ids) for running in self._running)
        return {
            "num_running_reqs": len(self._running),
            "num_waiting_reqs": self.in_flight - len(self._running),
            "num_used_tokens": used,
            "max_running_requests": self.limits.max_running,
            "tokens_sampled": self._counter.value,
        }

    # The work.

    async def run(self) -> None:
        """Compute, forever."""
        while True:
            if self.paused is None:
                self._admit()
                self._beat()
            if not self._has_work():
                self._wake.clear()
                await self._wake.wait()
                continue
            end = self._clock() + _SLICE_S
            while self._has_work() and self._clock() < end:
                self._turn()
            await asyncio.sleep(0)

    def _has_work(self) -> bool:
        return self.paused is None and bool(self._prefills or self._ready)

    def _beat(self) -> None:
        for beat in self._beats:
            if not beat.done():
                beat.set_result(None)
        self._beats.clear()

    def _admit(self) -> None:
        while self._waiting and not self._updates and len(self._running) < self.limits.max_running:
            running = self._waiting.popleft()
            if running.finish is None:
                self._running.add(running)
                self._prefills.append(running)

    def _turn(self) -> None:
        """A few positions of the first prompt, then one burst of the first request that samples."""
        if self._prefills:
            running = self._prefills[0]
            if running.finish is not None or self._prefill(running):
                self._prefills.popleft()
        if self._ready:
            running = self._ready.popleft()
            if running.finish is None:
                self._sample(running)

    def _prefill(self, running: Running) -> bool:
        request = running.request
        if running.generation is None:
            prompt = np.concatenate((request.prompt, np.array(running.ids, dtype=np.int32)))
            running.generation = self._model.start(prompt, request.sampling)
            if running.cached_tokens is None:
                running.cached_tokens = running.generation.cached_tokens
        if not running.generation.prefill(_PREFILL_POSITIONS):
            return False
        if running.pace is None:
            running.pace = Pace(self.limits.tokens_per_s, self._clock(), request.slowdown)
        if request.max_new_tokens == 0:
            self._finish(running, {"type": "length", "length": 0})
        else:
            self._next_chunk(running, running.pace)
        return True

    def _next_chunk(self, running: Running, pace: Pace) -> None:
        """As SGLang sends them: a stream's first token at once, and then as many tokens a chunk as the interval says.

        Without a pace they are all there at once, and SGLang joins what is there into one event.
        """
        request, produced, now = running.request, len(running.ids), self._clock()
        if pace.at_once(produced):
            size = request.max_new_tokens
        elif request.stream and not produced:
            size = 1
        else:
            size = request.stream_interval or self.limits.stream_interval
        running.target = min(pace.chunk_end(produced, size), request.max_new_tokens)
        running.due = pace.due(produced, running.target, now)
        self._arm(running, now)

    def _arm(self, running: Running, now: float) -> None:
        if running.timer is not None:
            running.timer.cancel()
            running.timer = None
        if running.due <= now:
            self._ready.append(running)
        else:
            running.timer = asyncio.get_running_loop().call_later(running.due - now, self._on_due, running)

    def _on_due(self, running: Running) -> None:
        running.timer = None
        self._ready.append(running)
        self._wake.set()

    def _sample(self, running: Running) -> None:
        request, generation, pace = running.request, running.generation, running.pace
        assert generation is not None
        assert pace is not None
        produced = len(running.ids)
        count = 1 if request.stop else min(self._model.burst, running.target - produced)
        banned: frozenset[int] = frozenset()
        if produced < request.min_new_tokens:
            banned, count = request.sampling.stops, min(count, request.min_new_tokens - produced)
        tokens, logprobs = generation.sample(count, banned)
        self._counter.add(len(tokens))
        running.record(tokens, logprobs, self.version)
        finish = self._finish_reason(running)
        if finish is not None:
            self._finish(running, finish)
        elif len(running.ids) >= running.target:
            running.publish()
            self._next_chunk(running, pace)
        else:
            self._ready.append(running)

    def _finish_reason(self, running: Running) -> JSON | None:
        request, last = running.request, running.ids[-1]
        if last in request.sampling.stops:
            return {"type": "stop", "matched": last}
        if request.stop and (matched := running.matched_stop_string()) is not None:
            return {"type": "stop", "matched": matched}
        if len(running.ids) >= request.max_new_tokens:
            return {"type": "length", "length": len(running.ids)}
        return None

    def _finish(self, running: Running, finish: JSON) -> None:
        """The end of a request. Queues that still hold it pass it over."""
        del self._requests[running.request.rid]
        request = running.request
        # As SGLang does, also of one that was aborted, if it ran.
        if request.routed_from is not None and self.limits.experts and running in self._running:
            ids = np.concatenate((request.prompt, np.array(running.ids, dtype=np.int32)))
            running.routed = self.limits.experts.encoded(ids, request.routed_from)
        self._release(running)
        running.end(finish, self._clock())
        self._wake.set()

    def _retract(self, running: Running) -> None:
        """Back to the front of those that wait; its prompt is then all it has, and its tokens go on the same."""
        self._release(running)
        running.retractions += 1
        self._waiting.appendleft(running)

    def _release(self, running: Running) -> None:
        if running.timer is not None:
            running.timer.cancel()
            running.timer = None
        if running.generation is not None:
            running.generation.close()
            running.generation = None
        self._running.discard(running)
        if not self._running:
            self._settled.set()
