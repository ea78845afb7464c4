"""How many calls an engine is given: the rule alone, and with an engine that can do only so much."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.engine.limit import Limit, Rules

RULES = Rules(floor=2, ceiling=256, start=32, target_s=0.5, tolerance=3.0, window_s=1.0)


@dataclass
class Engine:
    """Runs `running` calls at once, each `decode_s` long after its prefill; what comes beyond queues, and is refused where
    the queue is bounded. Prefills are done one after another."""

    running: int
    prefill_s: float = 0.05
    decode_s: float = 2.0
    queue: int | None = None


def drive(limit: Limit, engine: Engine, seconds: float, *, demand: int = 10_000, seed: int = 0, start: float = 0.0) -> tuple[float, float]:
    """Plays `seconds` of an engine that is never short of work beyond `demand` at once; calls finished a second, and refused."""
    rng, counter = random.Random(seed), itertools.count()
    events: list[tuple[float, int, str, float, int]] = [(start, next(counter), "begin", 0.0, 0)]
    in_flight = running = finished = refused = 0
    waiting: list[tuple[float, int]] = []
    prefill_free = start
    while events and events[0][0] < start + seconds:
        now, _, what, began, beside = heapq.heappop(events)

        def begin_running(began: float, beside: int, now: float = now) -> None:
            nonlocal running, prefill_free
            running += 1
            prefill_free = max(now, prefill_free) + engine.prefill_s * rng.uniform(0.5, 1.5)
            heapq.heappush(events, (prefill_free, next(counter), "first", began, beside))

        if what == "first":
            limit.answered(began, beside, in_flight, now)
            heapq.heappush(events, (now + engine.decode_s * rng.uniform(0.5, 1.5), next(counter), "end", began, beside))
        elif what == "end":
            running, in_flight, finished = running - 1, in_flight - 1, finished + 1
            if waiting:
                begin_running(*waiting.pop(0))
        while in_flight < min(limit.calls, demand):
            in_flight += 1
            limit.began(in_flight)
            if running < engine.running:
                begin_running(now, in_flight)
            elif engine.queue is not None and len(waiting) >= engine.queue:
                in_flight, refused = in_flight - 1, refused + 1
                limit.refused(now, now)
                heapq.heappush(events, (now + 0.2, next(counter), "wake", 0.0, 0))
                break
            else:
                waiting.append((now, in_flight))
    return finished / seconds, refused / seconds


happening = st.one_of(
    st.tuples(st.just("answered"), st.floats(0, 100), st.integers(1, 300)), st.tuples(st.just("refused"), st.floats(0, 100), st.just(0)),
    st.tuples(st.just("began"), st.floats(0, 1), st.integers(1, 300)),
)  # fmt: skip


@given(st.lists(st.tuples(happening, st.floats(0, 3)), max_size=200), st.integers(1, 400))
@settings(deadline=None)
def test_it_stays_between_floor_and_ceiling_whatever_happens(story: list[tuple[tuple[str, float, int], float]], start: int):
    limit, now = Limit(RULES, 0.0), 0.0
    limit.start(start)
    for (what, waited_s, beside), pause_s in story:
        now += pause_s
        match what:
            case "answered":
                limit.answered(now - waited_s, beside, beside, now)
            case "refused":
                limit.refused(now - waited_s, now)
            case _:
                limit.began(beside)
        assert RULES.floor <= limit.calls <= RULES.ceiling


@given(st.integers(2, 200), st.integers(1, 100))
@settings(deadline=None)
def test_a_burst_of_refusals_is_one_piece_of_news(start: int, refusals: int):
    limit = Limit(replace(RULES, start=start), 0.0)
    before = limit.calls
    for _ in range(refusals):
        limit.refused(1.0, 2.0)
    assert limit.calls == max(RULES.floor, int(before * 0.7))


@given(st.integers(6, 64), st.sampled_from((4, 32, 256)), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_it_finds_what_the_engine_can_do_from_wherever_it_begins(running: int, start: int, seed: int):
    limit, engine = Limit(replace(RULES, start=start), 0.0), Engine(running, prefill_s=0.01)
    drive(limit, engine, 150, seed=seed)
    finished, _ = drive(limit, engine, 100, seed=seed, start=150.0)
    assert finished >= 0.9 * running / (engine.decode_s + engine.prefill_s)
    assert limit.calls <= 1.5 * running + 6


@pytest.mark.parametrize("queue", [0, 4])
def test_an_engine_with_a_full_queue_is_kept_busy_and_is_not_hammered(queue: int):
    limit, engine = Limit(replace(RULES, start=256), 0.0), Engine(16, prefill_s=0.01, queue=queue)
    finished, refused = drive(limit, engine, 200)
    assert finished >= 0.85 * 16 / engine.decode_s
    assert refused < 0.2 * finished


def test_prompts_that_have_grown_are_not_taken_for_congestion():
    limit, engine = Limit(RULES, 0.0), Engine(64, prefill_s=0.001)
    drive(limit, engine, 60, demand=24)
    drive(limit, replace(engine, prefill_s=0.0, decode_s=2.0), 20, demand=24, start=60.0)
    slow = Engine(64, prefill_s=0.2, decode_s=30.0)
    finished, _ = drive(limit, slow, 2000, demand=24, start=80.0)
    assert finished >= 0.8 * 24 / 30.2
    assert limit.calls >= 20


def test_a_limit_that_nobody_needs_does_not_grow():
    limit = Limit(RULES, 0.0)
    drive(limit, Engine(1000, prefill_s=0.0001), 100, demand=10)
    assert limit.calls == RULES.start


def test_an_engine_without_bounds_is_given_all_there_is():
    limit = Limit(RULES, 0.0)
    drive(limit, Engine(1000, prefill_s=0.0001), 200)
    assert limit.calls == RULES.ceiling
