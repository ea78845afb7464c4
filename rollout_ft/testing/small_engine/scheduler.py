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
from rollout_ft.testing.small_engine.pacing import Pace
from rollout_ft.testing.small_engine.protocol import JSON, Died, DuplicateRid, Request, ValueRefused
from rollout_ft.testing.small_engine.routed import Experts
from rollout_ft.testing.small_engine.running import ABORTED, ABORTED_WAITING, Running, unavailable
from rollout_ft.testing.small_engine.vocabulary import Vocabulary
from rollout_ft.testing.small_engine.weights import Weights

_SLICE_S = 0.002
_PREFILL_POSITIONS = 8

PauseMode = Literal["abort", "in_place", "retract"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on; `max_queued` None is no limit, `tokens_per_s` 0 is as fast as it goes. Without `experts` no
    routed experts are returned, as by SGLang without --enable-return-routed-experts. A request that waits or runs for
    longer than `waiting_s` or `running_s` is ended: SGLang's SGLANG_REQ_WAITING_TIMEOUT and SGLANG_REQ_RUNNING_TIMEOUT."""

    tokens_per_s: float = 80.0
    stream_interval: int = 4
    context_length: int = 32768
    max_running: int = 1024
    max_queued: int | None = None
    experts: Experts | None = None
    waiting_s: float = -1
    running_s: float = -1


class Scheduler:
    """The requests of one engine."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        limits: Limits,
        weights: Weights,
        counter: Counter,
        clock: Clock,
    ) -> None:
        self.vocabulary = vocabulary
        self.limits = limits
        self.weights = weights
        self.paused: PauseMode | None = None
        self._paused_at = 0.0
        self._counter = counter
        self._clock = clock
        self._frozen_load: JSON | None = None
        self._requests: dict[str, Running] = {}
        self._held: dict[str, Running] = {}
        self._running: set[Running] = set()
        self._waiting: deque[Running] = deque()
        self._prefills: deque[Running] = deque()
        self._ready: deque[Running] = deque()
        self._stopping: dict[Running, JSON] = {}
        self._updates = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._beats: list[asyncio.Future[None]] = []

    # What the server asks for.

    def submit(self, request: Request) -> Running:
        """Take on a request; its `changed` event tells of progress."""
        if request.rid in self._requests:
            raise DuplicateRid(f"Duplicate request ID detected: {request.rid}")
        running = Running(request, self.vocabulary, self._clock())
        self._requests[request.rid] = running
        if self.paused:
            # SGLang holds them in front of its queue, where neither the queue's limit nor an abort finds them.
            self._held[request.rid] = running
        else:
            self._enqueue(running)
        return running

    def abort(self, rid: str) -> None:
        """One abort for each request: SGLang sends no second one, and the first is lost on one that is held."""
        running = self._requests.get(rid)
        if running is not None and not running.abort_sent:
            running.abort_sent = True
            self._stop(running)

    def abort_all(self) -> None:
        for running in list(self._requests.values()):
            self._stop(running)

    def drop(self, running: Running) -> None:
        """Its client went away."""
        if self._held.pop(running.request.rid, None) is not None:
            self._finish(running, ABORTED)
        elif running.finish is None:
            self._stop(running)

    def pause(self, mode: PauseMode) -> None:
        """No request begins from now on, and those that run are aborted, frozen, or sent back to wait."""
        if self.paused is None:
            self._paused_at = self._clock()
        if mode != "abort" and self._frozen_load is None:
            self._frozen_load = self.load()
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
        self.paused = self._frozen_load = None
        now = self._clock()
        for running in self._running | set(self._waiting):
            if running.pace is not None:
                running.pace.shift(now - self._paused_at)
                running.due += now - self._paused_at
            if running.timer is not None:
                self._arm(running, now)
        for running, finish in self._stopping.items():
            if running.finish is None:
                self._finish(running, finish)
        self._stopping.clear()
        held, self._held = list(self._held.values()), {}
        for running in held:
            self._enqueue(running)
        self._wake.set()

    def set_version(self, version: str) -> None:
        """Call the weights so, in the middle of whatever runs. Here the name makes the weights."""
        self.weights.load(version)
        self.weights.version = self.weights.told = version

    async def update_weights(self, version: str | None, seed: str | None, flush_cache: bool, file: bytes | None = None) -> None:
        """Take new weights: at once when paused, else when what runs has ended; new requests wait meanwhile.

        Raises ValueRefused when the cache could not be flushed: the weights were taken all the same.
        """
        self._updates += 1
        try:
            while not self.paused and self._running:
                self._settled.clear()
                await self._settled.wait()
            self.weights.load(seed or version or self.weights.seed, file)
            self.weights.version = version or self.weights.version
            if flush_cache and not self.flush_cache():
                raise ValueRefused(
                    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                    "Retract or finish them, then call /flush_cache."
                )
            self.weights.told = version or self.weights.told
        finally:
            self._updates -= 1
            self._wake.set()

    def flush_cache(self) -> bool:
        if not self.idle:
            return False
        self.weights.model.forget()
        return True

    def release_memory(self, tags: list[str]) -> None:
        if not self.idle:
            raise Died("release_memory_occupation should be called only when server is idle.")
        self.weights.release(tags)

    @property
    def idle(self) -> bool:
        """Nothing runs or waits; what waits in a pause needs no cache."""
        frozen = self.paused in ("in_place", "retract")
        return not self._running and (frozen or not self._queued)

    async def heartbeat(self) -> None:
        """Return when the run loop has come by; while it is frozen by a pause it does not."""
        beat: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._beats.append(beat)
        self._wake.set()
        await beat

    @property
    def _queued(self) -> int:
        return len(self._requests) - len(self._held) - len(self._running)

    def load(self) -> JSON:
        """While the scheduler is paused it publishes nothing new."""
        used = sum(len(running.request.prompt) + len(running.ids) for running in self._running)
        load: JSON = self._frozen_load or {
            "num_running_reqs": len(self._running),
            "num_waiting_reqs": self._queued,
            "num_used_tokens": used,
            "num_total_tokens": used,
            "max_running_requests": self.limits.max_running,
        }
        return {**load, "tokens_sampled": self._counter.value, "num_held_reqs": len(self._held)}

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
                self.weights.must_be_there()
                self._running.add(running)
                self._prefills.append(running)
                if not running.began_at:
                    running.began_at = self._clock()
                    self._watch_lease(running, self.limits.running_s)

    def _enqueue(self, running: Running) -> None:
        max_queued = self.limits.max_queued
        if max_queued is not None and self._queued + len(self._running) > self.limits.max_running + max_queued:
            self._finish(running, unavailable("The request queue is full."))
            return
        running.queued_at = self._clock()
        self._waiting.append(running)
        self._watch_lease(running, self.limits.waiting_s)
        self._wake.set()

    def _stop(self, running: Running, finish: JSON = ABORTED) -> None:
        """End a request where it is: what a pause holds goes on, and what it froze ends when the pause does."""
        if running.request.rid in self._held:
            return
        if running not in self._running:
            self._finish(running, ABORTED_WAITING if finish is ABORTED else finish)
        elif self.paused == "in_place":
            self._stopping.setdefault(running, finish)
        else:
            self._finish(running, finish)

    def _watch_lease(self, running: Running, lease_s: float) -> None:
        if lease_s > 0:
            asyncio.get_running_loop().call_later(lease_s + 0.001, self._check_leases, running)

    def _check_leases(self, running: Running) -> None:
        """A pause stops no lease, and a request that is sent back to wait has waited since it came."""
        if running.finish is not None:
            return
        now, limits = self._clock(), self.limits
        if running in self._running:
            if 0 < limits.running_s <= now - running.began_at:
                self._stop(running, unavailable("Request running timeout reached."))
        elif 0 < limits.waiting_s <= now - running.queued_at:
            self._stop(running, unavailable("Request waiting timeout reached."))

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
            if request.return_logprob and request.logprob_start >= 0 and not running.input_logprobs:
                running.input_logprobs = self.weights.model.score(request.prompt, request.sampling)[request.logprob_start :]
                running.input_logprobs[:1] = [None]
            prompt = np.concatenate((request.prompt, np.array(running.ids, dtype=np.int32)))
            running.generation = self.weights.model.start(prompt, request.sampling)
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
        count = 1 if request.stop else min(self.weights.model.burst, running.target - produced)
        banned: frozenset[int] = frozenset()
        if produced < request.min_new_tokens:
            banned, count = request.sampling.stops, min(count, request.min_new_tokens - produced)
        tokens, logprobs = generation.sample(count, banned)
        self._counter.add(len(tokens))
        running.record(tokens, logprobs, self.weights.version)
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
        running.ended_waiting = running not in self._running
        self._release(running)
        running.end(finish, self._clock())
        self._wake.set()

    def _retract(self, running: Running) -> None:
        """Back to the front of those that wait; its prompt is then all it has, and its tokens go on the same."""
        self._release(running)
        running.retractions += 1
        self._waiting.appendleft(running)
        self._check_leases(running)

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
