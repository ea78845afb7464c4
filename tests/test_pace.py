"""How long an engine may take, by what it was seen to need."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.engine.pace import MEASURABLE_TOKENS, WINDOW_S, Floors, Pace, Worst

many = settings(max_examples=300, deadline=None)
FLOORS = Floors(first_token_s=30, token_s=10, compile_s=180, ceiling_s=600, factor=3)
SECONDS = st.floats(0, 1000)
SAMPLES = st.lists(st.tuples(st.sampled_from(["first", "gap"]), st.floats(0, 300), st.integers(0, 200_000), st.floats(0, 200)), max_size=30)


def warm() -> Pace:
    """An engine that has done everything once, fast."""
    pace = Pace(FLOORS)
    pace.first_token(0.05, 20, 0)
    pace.gap(0.02, 0.02, 0)
    return pace


def after(samples: list[tuple[str, float, int, float]]) -> tuple[Pace, float]:
    pace, now = warm(), 0.0
    for kind, took_s, tokens, later_s in samples:
        now += later_s
        if kind == "gap":
            pace.gap(took_s, took_s, now)
        else:
            pace.first_token(took_s, tokens, now)
    return pace, now


def test_a_warm_engine_is_given_the_floors():
    assert warm().silence_s(1, longest=0, streams=True) == 10
    assert warm().silence_s(1, longest=1, streams=False) == pytest.approx(30, abs=0.01)


def test_what_an_engine_does_for_the_first_time_may_be_compiled():
    pace = Pace(FLOORS)
    assert pace.silence_s(0, longest=1, streams=False) > 180
    pace.first_token(100, 20, 100)
    assert pace.silence_s(101, longest=1, streams=False) < 31
    assert pace.silence_s(101, longest=0, streams=True) == 180
    pace.gap(50, 50, 150)
    assert pace.silence_s(151, longest=0, streams=True) == 10


def test_a_hundred_thousand_tokens_of_one_prompt_hold_up_everybody_for_as_long_as_they_were_seen_to_take():
    pace = warm()
    assert pace.silence_s(1, longest=100_000, streams=True) == pytest.approx(10 + 3 * 50)
    pace.first_token(25.0, 100_000, 2)
    assert pace.silence_s(3, longest=100_000, streams=True) == pytest.approx(10 + 3 * 25)


def test_a_prompt_that_was_in_the_cache_says_nothing_about_prefill():
    pace = warm()
    pace.first_token(0.1, 100, 2)
    assert pace.silence_s(3, longest=100_000, streams=True) == pytest.approx(10 + 3 * 50)


def test_a_slow_engine_is_given_longer_between_tokens_and_only_for_as_long_as_it_is_slow():
    pace = warm()
    pace.gap(8.0, 8.0, 100)
    assert pace.silence_s(101, longest=0, streams=True) == 24
    for i in range(10):
        pace.gap(0.1, 0.1, 130 + 30 * i)
    assert pace.silence_s(430, longest=0, streams=True) == 10


@many
@given(st.floats(0.001, 60), st.integers(MEASURABLE_TOKENS, 200_000))
def test_a_silence_that_a_prefill_explains_grants_no_longer_one_without(took_s: float, tokens: int):
    pace = warm()
    pace.first_token(took_s, tokens, 1)
    pace.gap(took_s, took_s, 2, longest=tokens)
    assert pace.silence_s(3, longest=0, streams=True) == 10
    pace.gap(took_s + 8.0, took_s, 4, longest=tokens)
    assert 10 <= pace.silence_s(5, longest=0, streams=True) <= 24.1


def test_a_call_among_many_on_a_slow_engine_stands_for_as_long_as_each_does():
    pace = warm()
    pace.gap(0.5, 20.0, 1)
    assert pace.silence_s(2, longest=0, streams=True) == 10
    assert pace.alone_s(2, tokens=0, queued=False) == 60


def test_a_call_that_waits_in_the_queue_of_an_engine_that_works_has_the_ceiling():
    assert warm().alone_s(1, tokens=100, queued=True) == 600


def test_one_that_lost_its_place_in_memory_is_given_time_for_all_of_its_tokens():
    assert warm().alone_s(1, tokens=60_000, queued=False) == pytest.approx(30 + 3 * 30)


@many
@given(SAMPLES, SECONDS, st.integers(0, 10**6), st.booleans())
def test_no_deadline_is_below_its_floor_or_above_the_ceiling(
    samples: list[tuple[str, float, int, float]], later_s: float, longest: int, streams: bool
):
    pace, now = after(samples)
    now += later_s
    assert (10 if streams else 30) <= pace.silence_s(now, longest=longest, streams=streams) <= 600
    assert 30 <= pace.alone_s(now, tokens=longest, queued=False) <= pace.alone_s(now, tokens=longest, queued=True) == 600


@many
@given(SAMPLES, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_longer_prompt_is_never_given_less(samples: list[tuple[str, float, int, float]], one: int, other: int):
    pace, now = after(samples)
    short, long = (pace.silence_s(now, longest=n, streams=True) for n in sorted((one, other)))
    assert short <= long


@many
@given(SAMPLES)
def test_what_was_just_seen_to_take_long_may_take_so_long_again(samples: list[tuple[str, float, int, float]]):
    pace, now = after(samples)
    pace.gap(20.0, 20.0, now)
    assert pace.silence_s(now + WINDOW_S - 0.1, longest=0, streams=True) >= 60


@many
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.001, 100)), min_size=1, max_size=40))
def test_the_worst_covers_one_window_and_forgets_after_three(samples: list[tuple[float, float]]):
    worst, now, seen = Worst(60), 0.0, list[tuple[float, float]]()
    for later_s, sample in samples:
        now += later_s
        worst.add(sample, now)
        seen.append((now, sample))
        value = worst.value(now)
        assert value >= max(s for at, s in seen if now - at <= 60)
        assert value <= max(s for at, s in seen if now - at <= 181)
